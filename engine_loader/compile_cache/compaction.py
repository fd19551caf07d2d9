"""Compaction: packs of a key are put together into one, which names those that it replaces.

It needs no lock, but one compactor at a time saves work (stores/leases). Pruning deletes replaced packs later
(retention). Damaged packs are left out: what is in them stays where it is.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter, defaultdict

from .cache_errors import CacheValidationError
from .key import CacheKey
from .packs.key_packs import effective_files, read_key, update_index
from .packs.manifest import ANY_HOST, Frame, HostGroup, Manifest, PackedFile
from .packs.pack import Pack, compress_members, finish_pack, read_frame
from .packs.relocate import is_group_file
from .stores.interface import Readable, Store, Upload
from .trust import Trust

_LARGE = 4
"""A pack so many times larger than all others together is not written again."""


class DamagedPackError(CacheValidationError):
    """A frame of ``pack`` is damaged."""

    def __init__(self, message: str, pack: Pack) -> None:
        super().__init__(message)
        self.pack = pack


def compact(store: Store, key: CacheKey, trust: Trust, *, level: int, more_than: int = 1) -> Pack | None:
    """Put packs of a key together into one, when there are more than ``more_than`` that no other replaces; None when
    there is nothing to do.

    Frames are copied as they are where all of their files still count. A pack that is far larger than the others
    stays as it is. Of packs with files that name their directories (Triton's group files), only those are put
    together that have equal directories.

    Raises:
        CacheOperationInterrupted: no room.
        OSError: the store fails.
    """
    found = read_key(store, key.prefix, trust)
    packs = living(found.packs)
    damaged: set[str] = set()
    while True:
        chosen = _chosen([pack for pack in packs if pack.stored.digest not in damaged], max(more_than, 1))
        if not chosen:
            return None
        try:
            made = _put_together(store, key, trust, packs, chosen, found.packs, level)
            break
        except DamagedPackError as error:
            damaged.add(error.pack.stored.digest)
    update_index(store, key.prefix, trust, found.packs)
    return made


def living(packs: list[Pack]) -> list[Pack]:
    """The packs that no compaction among them replaces."""
    gone = {name for pack in packs for name in pack.manifest.replaces}
    return [pack for pack in packs if pack.stored.digest not in gone]


def _chosen(packs: list[Pack], more_than: int) -> list[Pack]:
    """Which packs are put together: the largest group of those that may be, without one that is far larger than the
    rest.
    """
    if len(packs) <= more_than:
        return []
    alike = _alike(packs)
    by_size = sorted(alike, key=lambda pack: pack.stored.size)
    rest = sum(pack.stored.size for pack in by_size[:-1])
    if len(by_size) > 2 and by_size[-1].stored.size > _LARGE * rest:
        by_size.pop()
    chosen = {pack.stored.digest for pack in by_size}
    return [pack for pack in alike if pack.stored.digest in chosen] if len(chosen) > 1 else []


def _alike(packs: list[Pack]) -> list[Pack]:
    """The largest group of packs whose files may stand in one manifest, with one account of their directories."""
    anywhere = [pack for pack in packs if not any(is_group_file(file.path) for file in pack.manifest.files)]
    groups: dict[tuple[tuple[str, str], ...], list[Pack]] = defaultdict(list)
    for pack in packs:
        if pack not in anywhere:
            groups[tuple(sorted(pack.manifest.roots.items()))].append(pack)
    largest = max(groups.values(), key=len, default=[])
    return [pack for pack in packs if pack in anywhere or pack in largest]


def _put_together(
    store: Store, key: CacheKey, trust: Trust, packs: list[Pack], chosen: list[Pack], all_packs: list[Pack], level: int
) -> Pack:
    wanted: dict[tuple[str, int], list[PackedFile]] = defaultdict(list)
    for pack, file in effective_files(packs).values():
        wanted[pack.stored.name, file.frame].append(file)
    with store.upload(key.prefix) as upload:
        writer = _FrameWriter(upload, level)
        for pack in chosen:
            location = f"{store.description}/{pack.stored.name}"
            with store.open(pack.stored.name) as source:
                writer.add_pack(pack, source, wanted, location)
        # As old as the newest of those that it replaces: what was saved meanwhile is newer.
        manifest = Manifest(
            key=key,
            created=max(pack.manifest.created for pack in chosen),
            files=tuple(writer.files),
            frames=tuple(writer.frames),
            host=socket.gethostname(),
            roots=_roots_of(chosen),
            factors={path: value for pack in reversed(chosen) for path, value in pack.manifest.factors.items()},
            replaces=tuple(sorted({name for pack in chosen for name in (pack.stored.digest, *pack.manifest.replaces)})),
            hosts=tuple(writer.hosts),
        )
        # A pack with these files may be among those that are replaced.
        return finish_pack(upload, store, manifest, trust, {pack.stored.digest for pack in all_packs})


def _roots_of(chosen: list[Pack]) -> dict[str, str]:
    """The directories of the packs whose files name them; of any pack where none does."""
    naming = [pack for pack in chosen if any(is_group_file(file.path) for file in pack.manifest.files)]
    return dict((naming or chosen)[0].manifest.roots)


class _FrameWriter:
    """Writes the frames of a compaction.

    Attributes:
        frames, files, hosts: written, as in the manifest.
        position: bytes written.
    """

    def __init__(self, upload: Upload, level: int) -> None:
        self.frames: list[Frame] = []
        self.files: list[PackedFile] = []
        self.hosts: list[HostGroup] = []
        self.position = 0
        self._upload = upload
        self._level = level

    def add_pack(
        self, pack: Pack, source: Readable, wanted: dict[tuple[str, int], list[PackedFile]], location: str
    ) -> None:
        """Write the frames of one pack, with those files that are ``wanted`` of (pack, frame)."""
        held = Counter(file.frame for file in pack.manifest.files)
        frames = [
            (frame, sorted(members, key=lambda file: file.offset), len(members) == held[index])
            for index, frame in enumerate(pack.manifest.frames)
            if (members := wanted.get((pack.stored.name, index), []))
        ]
        source.expect([(frame.offset, frame.size) for frame, _, _ in frames])
        hosts = {ANY_HOST: ANY_HOST} | {index: self._index_of(group) for index, group in enumerate(pack.manifest.hosts)}
        for frame, members, is_whole in frames:
            moved = [file._replace(host=hosts[file.host]) for file in members]
            if is_whole:
                self._write(_checked(pack, source, frame, location), frame.raw_size, moved)
                continue
            try:
                content = read_frame(source, frame, location)
            except CacheValidationError as error:
                raise DamagedPackError(str(error), pack) from None
            self._write(*compress_members(content, moved, self._level))

    def _index_of(self, group: HostGroup) -> int:
        known = [host.hash for host in self.hosts]
        if group.hash not in known:
            self.hosts.append(group)
            return len(known)
        return known.index(group.hash)

    def _write(self, content: bytes, raw_size: int, members: list[PackedFile]) -> None:
        self.frames.append(Frame(self.position, len(content), raw_size, hashlib.sha256(content).hexdigest()))
        self.files += [file._replace(frame=len(self.frames) - 1) for file in members]
        self.position += len(content)
        self._upload.write(content)


def _checked(pack: Pack, source: Readable, frame: Frame, location: str) -> bytes:
    """The compressed bytes of a frame."""
    content = source.read(frame.offset, frame.size)
    if hashlib.sha256(content).hexdigest() != frame.sha256:
        raise DamagedPackError(f"{location}: the frame at byte {frame.offset} is damaged", pack)
    return content
