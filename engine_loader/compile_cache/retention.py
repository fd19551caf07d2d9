"""Pruning: unused keys, replaced packs and leftovers of writers are deleted from a store.

It needs no lock. A compaction names the packs that it replaces, and they are deleted a grace time after it, so that a
restore that has listed them can still read them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from .cache_errors import CacheError
from .packs.pack import read_manifest
from .stores.interface import Store, Stored
from .trust import Trust

GRACE_S = 600.0
"""How long a replaced pack stays: longer than a restore takes from listing to reading."""


@dataclass(frozen=True)
class Policy:
    """What pruning leaves: keys used within ``days``, at most ``keys`` of them and ``bytes`` in all, the latest
    first.
    """

    days: float
    keys: int
    bytes: int
    unfinished_s: float


@dataclass
class Pruned:
    """What was deleted, and why: (name, bytes, reason) each."""

    deleted: list[tuple[str, int, str]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.deleted)


def prune(store: Store, policy: Policy, trust: Trust, *, now: float | None = None, dry_run: bool = False) -> Pruned:
    """Delete leftovers, replaced packs, and what the policy does not keep. A pack that cannot be deleted is a
    message.
    """
    now = time.time() if now is None else now
    done = Pruned()

    def delete(stored: Stored, reason: str) -> None:
        try:
            if not dry_run:
                store.delete(stored.name)
            done.deleted.append((stored.name, stored.size, reason))
        except OSError as error:
            done.messages.append(f"{store.description}/{stored.name}: could not be deleted: {error}")

    for stored in list(store.unfinished()):
        if now - stored.modified > policy.unfinished_s:
            delete(stored, "left unfinished")
    keys: dict[str, list[Stored]] = defaultdict(list)
    for stored in store.list():
        keys[stored.key_prefix].append(stored)
    for prefix, packs in keys.items():
        if len(packs) > 1:
            keys[prefix] = _without_replaced(store, prefix, packs, trust, now, delete)
    _apply(policy, keys, now, delete)
    return done


def _without_replaced(
    store: Store, prefix: str, packs: list[Stored], trust: Trust, now: float, delete: Callable[[Stored, str], None]
) -> list[Stored]:
    replaced: set[str] = set()
    for stored in packs:
        if now - stored.modified > GRACE_S:
            with suppress(CacheError, OSError):  # what is not to be trusted replaces nothing
                replaced.update(read_manifest(store, stored, prefix, trust).manifest.replaces)
    left = []
    for stored in packs:
        if stored.digest in replaced:
            delete(stored, "replaced by a compaction")
        else:
            left.append(stored)
    return left


def _apply(policy: Policy, keys: dict[str, list[Stored]], now: float, delete: Callable[[Stored, str], None]) -> None:
    latest_first = sorted(
        keys.values(), key=lambda packs: max((pack.modified for pack in packs), default=0.0), reverse=True
    )
    kept_bytes = 0
    for rank, packs in enumerate(filter(None, latest_first)):
        kept_bytes += sum(pack.size for pack in packs)
        age_s = now - max(pack.modified for pack in packs)
        if age_s > policy.days * 86400:
            reason = f"not used for {age_s / 86400:.0f} days"
        elif rank >= policy.keys:
            reason = f"more than {policy.keys} keys"
        elif kept_bytes > policy.bytes and rank:
            reason = "the store is over its size"
        else:
            continue
        kept_bytes -= sum(pack.size for pack in packs)
        for pack in packs:
            delete(pack, reason)
