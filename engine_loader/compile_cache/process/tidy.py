"""What a save does for the store after it: compaction when a key has many packs, and pruning now and then."""

from __future__ import annotations

import random
import time

from ...settings import CompileCacheSettings
from ..cache_errors import CacheError
from ..compaction import compact
from ..key import CacheKey
from ..packs.key_packs import living, read_key
from ..packs.pack import SMALL_BYTES
from ..retention import Policy, prune
from ..stores.interface import Store
from ..stores.leases import acquire
from ..stores.object_names import PRUNED
from ..stores.uses import day
from ..trust import Trust
from .outcome import Outcome

_LEASE_S = 900.0
_MOST_ROUNDS = 5
_MOST_LARGE = 2
"""Packs of a key that its index does not hold as a whole: each costs a restore a request."""
_PRUNES = 0.1
"""How many saves prune, beside the first of a day."""


def policy_of(settings: CompileCacheSettings) -> Policy:
    """What pruning keeps."""
    return Policy(settings.keep_days, settings.keep_keys, int(settings.keep_bytes), settings.unfinished_timeout_s)


def tidy(store: Store, key: CacheKey, settings: CompileCacheSettings, trust: Trust, outcome: Outcome) -> None:
    """Compact the key that was saved, and prune the store. A failure is a note of the outcome."""
    for work in (_compact, _prune):
        try:
            work(store, key, settings, trust, outcome)
        except (OSError, CacheError) as error:
            outcome.notes.append(f"the store could not be tidied up: {error}")


def _compact(store: Store, key: CacheKey, settings: CompileCacheSettings, trust: Trust, outcome: Outcome) -> None:
    if outcome.status != "saved":
        return
    for _ in range(_MOST_ROUNDS):
        # Looked at again without the lease: others that have saved meanwhile have left it to this process.
        packs = living(read_key(store, key.prefix, trust).packs)
        large = sum(pack.stored.size > SMALL_BYTES for pack in packs)
        more_than = settings.compact_packs if large <= _MOST_LARGE else _MOST_LARGE
        if len(packs) <= more_than:
            return
        lease = acquire(store, key.prefix, "compact", _LEASE_S)
        if lease is None:
            return  # another process does it
        try:
            if compact(store, key, trust, level=settings.compression_level, more_than=more_than) is None:
                return
        finally:
            lease.release()


def _prune(store: Store, key: CacheKey, settings: CompileCacheSettings, trust: Trust, outcome: Outcome) -> None:
    if not store.name or not _is_due(store, outcome):
        return
    lease = acquire(store, "", "prune", _LEASE_S)
    if lease is None:
        return
    try:
        outcome.notes += prune(store, policy_of(settings), trust).messages
    finally:
        lease.release()


def _is_due(store: Store, outcome: Outcome) -> bool:
    """Whether this save prunes: some do, by chance, and the first of a day."""
    if random.random() < _PRUNES:
        return True
    return outcome.status == "saved" and store.create(f"{PRUNED}{day(time.time())}", b"")
