"""Pruning: unused keys, replaced packs and leftovers of writers are deleted from a store.

It needs no lock. A compaction names the packs that it replaces, and they are deleted a grace time after it, so that a
restore that has listed them can still read them. Ages are counted in the store's time. What has no name of ours, and
packs that do not verify, are neither counted nor deleted.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from .cache_errors import CacheError
from .packs.key_packs import MOST_FOR_AN_INDEX, Refusal, read_key, update_index
from .stores.interface import Store, Stored
from .stores.object_names import SAVING
from .stores.uses import last_used
from .trust import Trust

GRACE_S = 600.0
"""How long a replaced pack stays: longer than a restore takes from listing to reading."""
MOST_SKEW_S = 300.0
"""Nothing is pruned by a machine whose clock is further from the store's."""
_LONGEST_LEASE_S = 3600.0


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


def prune(
    store: Store,
    policy: Policy,
    trust: Trust,
    *,
    now: float | None = None,
    dry_run: bool = False,
    unverified: bool = False,
) -> Pruned:
    """Delete leftovers, replaced packs, and what the policy does not keep. A pack that cannot be deleted is a
    message.

    Args:
        now: the store's time; None: as the store says.
        unverified: delete packs that are not trusted or damaged at their ends, too.

    Raises:
        CacheValidationError: the store has no marker, or is not trusted.
        OSError: the store cannot be listed.
    """
    done = Pruned()
    if not store.name:
        return done
    if now is None:
        now = store.now()
        if (skew_s := abs(time.time() - now)) > MOST_SKEW_S:
            done.messages.append(
                f"{store.description}: nothing was pruned: this machine's clock and the store's are {skew_s:.0f} s "
                "apart; set this machine's"
            )
            return done
    _Pruning(store, policy, trust, now, done, dry_run, unverified).run()
    return done


class _Pruning:
    def __init__(
        self, store: Store, policy: Policy, trust: Trust, now: float, done: Pruned, dry_run: bool, unverified: bool
    ) -> None:
        self._store = store
        self._policy = policy
        self._trust = trust
        self._now = now
        self._done = done
        self._dry_run = dry_run
        self._unverified = unverified
        self._refused: list[Refusal] = []

    def run(self) -> None:
        below: dict[str, list[Stored]] = defaultdict(list)
        for entry in self._store.entries():
            below[entry.key_prefix].append(entry)
        self._done.messages += [f"{what}: cannot be looked into" for what in self._store.unreadable]
        self._leftovers([*below.pop("", []), *below.pop(SAVING, [])])
        keys = []
        for prefix, entries in below.items():
            self._leftovers(entries)
            keys.append(self._tidied(prefix, entries))
        self._apply([key for key in keys if key.packs])
        self._apply_to_refused()

    def _leftovers(self, entries: list[Stored]) -> None:
        for entry in entries:
            age_s = self._now - entry.modified
            if entry.kind == "unfinished" and age_s > self._policy.unfinished_s:
                self._delete(entry, "left unfinished")
            elif entry.kind == "saving" and age_s > self._policy.unfinished_s:
                self._delete(entry, "a note of a save that is gone", note=True)
            elif entry.kind == "lease" and age_s > _LONGEST_LEASE_S:
                self._delete(entry, "a lease of a process that is gone", note=True)
            elif entry.kind == "pruned" and age_s > 2 * 86400:
                self._delete(entry, "an old note", note=True)

    def _tidied(self, prefix: str, entries: list[Stored]) -> _Key:
        """A key without replaced packs and old notes."""
        found = read_key(self._store, prefix, self._trust, entries=entries, most_singly=MOST_FOR_AN_INDEX)
        replaced = {
            name
            for pack in found.packs
            if self._now - pack.stored.modified > GRACE_S
            for name in pack.manifest.replaces
        }
        key = _Key(prefix, entries, max([last_used(entries), *(pack.stored.modified for pack in found.packs)]))
        changed = False
        for pack in found.packs:
            if pack.stored.digest in replaced:
                changed |= self._delete(pack.stored, "replaced by a compaction")
            else:
                key.packs.append(pack.stored)
        for one in found.refused if self._unverified else ():
            if self._now - one.stored.modified > GRACE_S:  # one may be just being written
                changed |= self._delete(one.stored, f"does not verify: {one.reason}")
        self._refused += [] if self._unverified else found.refused
        if changed and not self._dry_run:
            self._attempt(prefix, lambda: update_index(self._store, prefix, self._trust, found.packs))
        newest = last_used(entries)
        for entry in entries:
            if entry.kind == "used" and entry.modified < newest:
                self._delete(entry, "an old note", note=True)
        return key

    def _apply_to_refused(self) -> None:
        """Delete refused packs that are older than what the policy keeps and that a key of this node has signed.

        They are denied, too old, or damaged behind their signature. What no key of this node has signed may be another
        fleet's, whoever owns the file: in containers, everybody is the same user.
        """
        changed = set()
        for one in self._refused:
            age_s = self._now - one.stored.modified
            if one.is_signed and age_s > self._policy.days * 86400:
                reason = f"refused, and written {age_s / 86400:.0f} days ago"
                if self._delete(one.stored, reason) and not self._dry_run:
                    changed.add(one.stored.key_prefix)
        for prefix in sorted(changed):
            self._attempt(prefix, partial(update_index, self._store, prefix, self._trust))

    def _apply(self, keys: list[_Key]) -> None:
        kept_bytes = 0
        for rank, key in enumerate(sorted(keys, key=lambda key: key.used, reverse=True)):
            size = sum(pack.size for pack in key.packs)
            age_s = self._now - key.used
            if age_s > self._policy.days * 86400:
                reason = f"not used for {age_s / 86400:.0f} days"
            elif rank >= self._policy.keys:
                reason = f"more than {self._policy.keys} keys"
            elif kept_bytes + size > self._policy.bytes and rank:
                reason = "the store is over its size"
            else:
                kept_bytes += size
                continue
            self._delete_key(key, reason)

    def _delete_key(self, key: _Key, reason: str) -> None:
        for pack in key.packs:
            self._delete(pack, reason)
        if self._dry_run:
            return
        gone = {pack.name for pack in key.packs}
        if all(entry.name in gone for entry in key.entries if entry.kind == "pack"):
            for entry in key.entries:
                if entry.kind in ("index", "used", "suspect", "quarantined"):
                    self._delete(entry, reason, note=True)
        else:
            self._attempt(key.prefix, lambda: update_index(self._store, key.prefix, self._trust))

    def _delete(self, stored: Stored, reason: str, *, note: bool = False) -> bool:
        """Whether it was deleted; notes are not told of."""
        if not self._dry_run and not self._attempt(stored.name, lambda: self._store.delete(stored.name)):
            return False
        if not note:
            self._done.deleted.append((stored.name, stored.size, reason))
        return True

    def _attempt(self, name: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except (OSError, CacheError) as error:
            self._done.messages.append(f"{self._store.description}/{name}: could not be deleted: {error}")
            return False
        return True


@dataclass
class _Key:
    """A key, its objects, when it was last made or used, and the packs that count."""

    prefix: str
    entries: list[Stored]
    used: float
    packs: list[Stored] = field(default_factory=list)
