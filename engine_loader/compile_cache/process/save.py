"""A save: at most one new pack with what the local caches have and the store does not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..directories import depends_on
from ..host.groups import HostGroup
from ..key import CacheKey
from ..packs.elf import is_cut_short
from ..packs.key_packs import KeyPacks, files_for, for_this_host, read_key, update_index
from ..packs.manifest import Frame, Manifest, PackedFile, unsafe_link, unsafe_path
from ..packs.pack import Pack
from ..packs.packing import LARGEST_FILE_BYTES, write_pack
from ..packs.relocate import is_group_file, relocated
from ..packs.scan import LocalFile, open_unchanged
from ..space import mib
from ..stores.interface import Store, Stored
from ..stores.leases import acquire, save_slot
from ..stores.object_names import LEASE
from ..trust import Trust
from ..verdict.factors import without_secrets
from .outcome import Outcome

FACTORS = "cache_key_factors.json"
_MOST_FACTORS_BYTES = 256 << 10
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_LEAST_LEASE_S = 30.0

Digests = dict[tuple[str, int, int, tuple[tuple[str, str], ...]], str]
"""(path, size, mtime, directories) -> digest of a local file."""


@dataclass(frozen=True)
class SaveOptions:
    """How a save is done.

    Attributes:
        threads: that compress.
        level: of zstd.
        most_bytes: a pack that would be larger is given up.
        wait_s: how long another pod's save of the key is waited for.
        most_at_once: how many saves write to the store at once; 0: any number.
        unfinished_s: age at which one of them counts as left over.
    """

    threads: int
    level: int
    most_bytes: int
    wait_s: float = 0.0
    most_at_once: int = 0
    unfinished_s: float = 3600.0


class Save:
    """Brings those of ``files`` into the store that its packs of ``key`` do not hold as they are.

    Pods of a fleet that compiled alike agree by a lease that one of them saves; the others wait for its pack, and save
    what it lacks.

    Args:
        damaged: frames, each as (name of its pack, index), that are there, but cannot be restored: what they hold is
            saved anew.

    Attributes:
        passed_over: whether ``options.most_at_once`` others were writing.
    """

    def __init__(
        self,
        store: Store,
        key: CacheKey,
        directories: Mapping[str, Path],
        files: Sequence[LocalFile],
        trust: Trust,
        options: SaveOptions,
        factors: Mapping[str, Any] | None = None,
        damaged: Collection[tuple[str, int]] = frozenset(),
    ) -> None:
        self._store = store
        self._key = key
        self._directories = directories
        self._files = files
        self._trust = trust
        self._options = options
        self._factors = factors or {}
        self._damaged = damaged
        self._digests: Digests = {}
        self.passed_over = False
        self._outcome = Outcome("complete")

    def run(self, found: KeyPacks | None = None) -> Outcome:
        """Save.

        Args:
            found: what the store has of the key, where that was read already.

        Raises:
            CacheOperationInterrupted: no room, or the pack would be too large; nothing half-written is left.
            OSError: the store fails.
        """
        began = time.monotonic()
        outcome = self._outcome
        found = read_key(self._store, self._key.prefix, self._trust) if found is None else found
        outcome.messages += found.messages()
        new = self._new(found.packs, tell=True)
        if not new:
            outcome.status = "complete" if found.packs else "nothing"
        else:
            self._store.found()
            self._save_in_turn(found, new)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _save_in_turn(self, found: KeyPacks, new: list[LocalFile]) -> None:
        """Save with the key's lease, or when it was waited for long enough."""
        prefix = self._key.prefix
        turn = _Turn(self._store, prefix, self._options.wait_s)
        entries = found.entries
        while True:
            with turn.lease(entries) as is_ours:
                entries = self._store.entries(prefix)
                if _packs_of(entries) != _packs_of(found.entries):
                    found = read_key(self._store, prefix, self._trust, known=found.packs, entries=entries)
                    new = self._new(found.packs)
                if not new:
                    return
                if is_ours or turn.is_over():
                    self._save_in_a_slot(found, new)
                    return
            turn.wait()

    def _save_in_a_slot(self, found: KeyPacks, new: list[LocalFile]) -> None:
        """Save, unless too many others are writing to the store."""
        if not self._options.most_at_once:
            self._save(found, new)
            return
        with save_slot(self._store, self._options.most_at_once, self._options.unfinished_s) as is_free:
            if is_free:
                self._save(found, new)
            else:
                self.passed_over, self._outcome.status = True, "nothing"

    def _save(self, found: KeyPacks, new: list[LocalFile]) -> None:
        # They compress to a quarter or so; the room is watched, too.
        self._store.make_room(min(sum(file.size for file in new) // 8, self._options.most_bytes))
        created = max([self._store.now(), *(pack.manifest.created + 1 for pack in found.packs)])

        def describe(packed: tuple[PackedFile, ...], frames: tuple[Frame, ...]) -> Manifest:
            files, hosts = with_hosts(packed, self._key)
            return Manifest(
                key=self._key,
                created=created,
                files=files,
                frames=frames,
                host=socket.gethostname(),
                roots={name: str(path) for name, path in self._directories.items()},
                factors=self._factors,
                hosts=hosts,
            )

        def is_wanted(packed: Sequence[PackedFile]) -> bool:
            """Whether some of what was packed is still not in the store: others may have saved it meanwhile."""
            nonlocal found
            found = read_key(self._store, self._key.prefix, self._trust, known=found.packs)
            known = files_for(for_this_host(found.packs, self._key), without=self._damaged)
            return any(file.path not in known or not _holds(known[file.path][1], file) for file in packed)

        pack = write_pack(
            self._store,
            describe,
            self._key,
            new,
            self._trust,
            threads=self._options.threads,
            level=self._options.level,
            most_bytes=self._options.most_bytes,
            avoid=lambda: found.taken | self._names_of_damaged(),
            is_wanted=is_wanted,
        )
        if pack is not None:
            outcome = self._outcome
            outcome.status = "saved"
            outcome.files, outcome.bytes = len(pack.manifest.files), pack.manifest.content_bytes
            outcome.pack_bytes, outcome.packs = pack.stored.size, 1
            update_index(self._store, self._key.prefix, self._trust, [*found.packs, pack])

    def _names_of_damaged(self) -> set[str]:
        """Digests of packs with damaged frames: an equal pack needs a name of its own."""
        return {Stored(name, 0, 0.0).digest for name, _ in self._damaged}

    def _new(self, packs: list[Pack], *, tell: bool = False) -> list[LocalFile]:
        """The files that are to be saved; with ``tell``, a message for each that must not be."""
        new = []
        packs = for_this_host(packs, self._key)
        for file in not_in(packs, self._files, self._directories, self._digests, self._damaged):
            if os.path.basename(file.path) == FACTORS:
                continue  # the manifest has what may be stored of it
            problem = _problem(file)
            if problem is None:
                new.append(file)
            elif tell:
                self._outcome.messages.append(f"{file.local} {problem}")
        return new


class _Turn:
    """Waits for the lease by which one pod at a time saves a key, looking ever less often."""

    def __init__(self, store: Store, prefix: str, wait_s: float) -> None:
        self._store = store
        self._prefix = prefix
        self._deadline = time.monotonic() + wait_s
        # Shorter than others wait, so that the lease of a process that died is taken over.
        self._lease_s = max(wait_s * 0.75, _LEAST_LEASE_S)
        self._seen: dict[str, float] = {}
        self._pause_s = _FIRST_PAUSE_S

    @contextmanager
    def lease(self, entries: Iterable[Stored]) -> Iterator[bool]:
        """Hold the lease for a block, if the listing shows none, or one that may be left over; whether it is held."""
        lease = acquire(self._store, self._prefix, "save", self._lease_s) if self._may_be_free(entries) else None
        try:
            yield lease is not None
        finally:
            if lease is not None:
                lease.release()

    def is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    def wait(self) -> None:
        time.sleep(min(random.uniform(0.5, 1.5) * self._pause_s, max(self._deadline - time.monotonic(), 0)))
        self._pause_s = min(self._pause_s * 1.5, _LONGEST_PAUSE_S)

    def _may_be_free(self, entries: Iterable[Stored]) -> bool:
        name = f"{self._prefix}/{LEASE}save"
        version = next((f"{entry.version}@{entry.modified}" for entry in entries if entry.name == name), None)
        if version is None:
            return True
        now = time.monotonic()
        return now - self._seen.setdefault(version, now) > self._lease_s


def save(
    store: Store,
    key: CacheKey,
    directories: Mapping[str, Path],
    files: Sequence[LocalFile],
    trust: Trust,
    *,
    factors: Mapping[str, Any] | None = None,
    threads: int,
    level: int,
    most_bytes: int,
) -> Outcome:
    """Save without waiting for other pods; see ``Save``."""
    options = SaveOptions(threads, level, most_bytes)
    return Save(store, key, directories, files, trust, options, factors).run()


def _packs_of(entries: Iterable[Stored]) -> set[str]:
    return {entry.name for entry in entries if entry.kind in ("pack", "quarantined")}


def _holds(there: PackedFile, here: PackedFile) -> bool:
    return (there.sha256, there.link, there.size) == (here.sha256, here.link, here.size)


def with_hosts(files: Iterable[PackedFile], key: CacheKey) -> tuple[tuple[PackedFile, ...], tuple[HostGroup, ...]]:
    """``files`` with the group of host facts that each depends on, and these groups."""
    hosts: list[HostGroup] = []
    marked = []
    groups = key.host_groups
    for file in files:
        code = depends_on(file.path) if groups else "any"
        group = None if code == "any" else groups.get(code)
        if group is not None and group not in hosts:
            hosts.append(group)
        marked.append(file if group is None else file._replace(host=hosts.index(group)))
    return tuple(marked), tuple(hosts)


def _problem(file: LocalFile) -> str | None:
    """Why a file must not be saved."""
    if file.size >= LARGEST_FILE_BYTES:
        return f"has {mib(file.size)}, and packs hold no file of 4 GiB or more"
    with suppress(OSError):  # what is gone, or cannot be read, is left out when it is packed
        if not file.link and is_cut_short(file.local, file.size):
            return "is cut short, as a linker leaves it that was killed: it is not saved; delete it"
    return None


def not_in(
    packs: list[Pack],
    files: Iterable[LocalFile],
    directories: Mapping[str, Path] | None = None,
    digests: Digests | None = None,
    damaged: Collection[tuple[str, int]] = frozenset(),
) -> list[LocalFile]:
    """The files that no pack holds as they are now. What could not be restored (an unsafe path or link) is left out.

    Args:
        directories: name of a cache -> where it is: files that name it are compared as they would be elsewhere.
        digests: of files, kept from one call to the next.
        damaged: frames, each as (name of its pack, index), that do not count.
    """
    known = files_for(packs, without=damaged)
    digests = {} if digests is None else digests
    new = []
    for file in files:
        if unsafe_path(file.path) or (file.link and unsafe_link(file.path, file.link)):
            continue
        found = known.get(file.path)
        if found is None or not _is_same(file, *found, directories or {}, digests):
            new.append(file)
    return new


def _is_same(
    local: LocalFile, pack: Pack, packed: PackedFile, directories: Mapping[str, Path], digests: Digests
) -> bool:
    if local.link or packed.link:
        return local.link == packed.link
    is_group = is_group_file(local.path)
    if local.mtime_ns == packed.mtime_ns and (local.size == packed.size or is_group):
        return True  # as it was restored: a group file's size depends on where it is
    if local.size != packed.size and not is_group:
        return False
    roots = pack.manifest.roots if is_group else {}
    moves = tuple((str(directories[name]), roots[name]) for name in sorted(roots) if name in directories)
    try:
        return _digest(local, moves, digests) == packed.sha256
    except OSError:
        return True  # it is gone: there is nothing to save


def _digest(file: LocalFile, moves: tuple[tuple[str, str], ...], digests: Digests) -> str:
    """A file's digest as it would be in other directories: (here, there) each."""
    name = (file.path, file.size, file.mtime_ns, moves)
    if name not in digests:
        with open(open_unchanged(file), "rb") as content:
            if moves:
                old = {str(number): here for number, (here, _) in enumerate(moves)}
                new = {str(number): Path(there) for number, (_, there) in enumerate(moves)}
                digests[name] = hashlib.sha256(relocated(content.read(), old, new)).hexdigest()
            else:
                digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests[name]


def factors_of(files: Iterable[LocalFile]) -> dict[str, Any]:
    """What the engine itself says of its keys, by path, without secrets: older engines write all variables there."""
    found: dict[str, Any] = {}
    for file in files:
        if os.path.basename(file.path) == FACTORS and file.size <= _MOST_FACTORS_BYTES:
            with suppress(OSError, ValueError), open(open_unchanged(file), "rb") as content:
                found[file.path] = without_secrets(json.load(content))
    return found
