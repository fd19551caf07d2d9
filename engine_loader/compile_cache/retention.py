"""What keeps a store small: packs put together, keys that nobody uses pruned, leftovers of dead writers deleted.

Nothing here needs a lock. A compaction names the packs that it replaces, and those go a grace time after it was seen,
so that whoever had listed them can still read them.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from .cache_errors import CacheError
from .key import CacheKey
from .packs.key_packs import effective_files, read_packs
from .packs.manifest import Frame, Manifest, PackedFile
from .packs.pack import Pack, compress_members, finish_pack, read_frame, read_manifest
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


def compact(store: Store, key: CacheKey, trust: Trust, *, level: int, more_than: int = 1) -> Pack | None:
    """Put the packs of a key together into one, when there are more than ``more_than``; None when there is nothing to
    do.

    Frames are taken over as they are where all of their files still count; only packs whose caches lay at the same
    places are put together (Triton's files name the place).

    Raises:
        CacheOperationInterrupted: no room.
        OSError: the store fails.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Pack]] = defaultdict(list)
    for pack in read_packs(store, key, trust, []):
        groups[tuple(sorted(pack.manifest.roots.items()))].append(pack)
    packs = max(groups.values(), key=len, default=[])
    gone = {name for pack in packs for name in pack.manifest.replaces}
    packs = [pack for pack in packs if pack.stored.digest not in gone]
    if len(packs) <= max(more_than, 1):
        return None
    wanted: dict[tuple[str, int], list[PackedFile]] = defaultdict(list)
    for pack, file in effective_files(packs).values():
        wanted[pack.stored.name, file.frame].append(file)
    frames: list[Frame] = []
    files: list[PackedFile] = []
    position = 0
    with store.upload(key.prefix) as upload:
        for pack in packs:
            in_frames: dict[int, int] = defaultdict(int)
            for file in pack.manifest.files:
                in_frames[file.frame] += 1
            with store.open(pack.stored.name) as source:
                for index, frame in enumerate(pack.manifest.frames):
                    members = sorted(wanted.get((pack.stored.name, index), []), key=lambda file: file.offset)
                    if not members:
                        continue
                    place = f"{store.description}/{pack.stored.name}"
                    if len(members) == in_frames[index]:
                        content, raw_size = source.read(frame.offset, frame.size), frame.raw_size
                        if hashlib.sha256(content).hexdigest() != frame.sha256:
                            raise CacheError(f"{place}: a frame is damaged: it is not put together with others")
                    else:
                        content, raw_size, members = compress_members(read_frame(source, frame, place), members, level)
                    frames.append(Frame(position, len(content), raw_size, hashlib.sha256(content).hexdigest()))
                    files += [file._replace(frame=len(frames) - 1) for file in members]
                    position += len(content)
                    upload.write(content)
        # As old as the newest of those that it replaces: what was saved meanwhile is newer.
        manifest = Manifest(
            key=key,
            created=max(pack.manifest.created for pack in packs),
            files=tuple(files),
            frames=tuple(frames),
            host=socket.gethostname(),
            roots=packs[0].manifest.roots,
            factors={path: value for pack in reversed(packs) for path, value in pack.manifest.factors.items()},
            replaces=tuple(sorted({pack.stored.digest for pack in packs} | gone)),
        )
        return finish_pack(upload, manifest, position, trust)
