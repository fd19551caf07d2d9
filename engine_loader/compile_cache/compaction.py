"""Compaction: the packs of a key are put together into one, which names those that it replaces.

It needs no lock: pruning deletes replaced packs later (retention).
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter, defaultdict

from .cache_errors import CacheError
from .host.groups import HostGroup
from .key import CacheKey
from .packs.key_packs import effective_files, for_each_host, read_packs
from .packs.manifest import Frame, Manifest, PackedFile
from .packs.pack import Pack, compress_members, finish_pack, read_frame
from .stores.interface import Readable, Store, Upload
from .trust import Trust


def compact(store: Store, key: CacheKey, trust: Trust, *, level: int, more_than: int = 1) -> Pack | None:
    """Put the packs of a key together into one, when there are more than ``more_than``; None when there is nothing to
    do.

    Frames are copied as they are where all of their files still count. Only packs whose caches had the same
    directories are put together, for Triton's files name them.

    Raises:
        CacheOperationInterrupted: no room.
        CacheError: a frame is damaged.
        OSError: the store fails.
    """
    packs, gone = _packs_alike(read_packs(store, key, trust, []))
    if len(packs) <= max(more_than, 1):
        return None
    wanted: dict[tuple[str, int], list[PackedFile]] = defaultdict(list)
    for seen in for_each_host(packs):
        for pack, file in effective_files(seen).values():
            wanted[pack.stored.name, file.frame].append(file)
    with store.upload(key.prefix) as upload:
        writer = _FrameWriter(upload, level, packs)
        for pack in packs:
            location = f"{store.description}/{pack.stored.name}"
            with store.open(pack.stored.name) as source:
                writer.add_pack(pack, source, wanted, location)
        # As old as the newest of those that it replaces: what was saved meanwhile is newer.
        manifest = Manifest(
            key=key,
            created=max(pack.manifest.created for pack in packs),
            files=tuple(writer.files),
            frames=tuple(writer.frames),
            host=socket.gethostname(),
            roots=packs[0].manifest.roots,
            factors={path: value for pack in reversed(packs) for path, value in pack.manifest.factors.items()},
            replaces=tuple(sorted({pack.stored.digest for pack in packs} | gone)),
            hosts=writer.hosts,
        )
        return finish_pack(upload, manifest, writer.position, trust)


def _packs_alike(packs: list[Pack]) -> tuple[list[Pack], set[str]]:
    """The largest group of packs with equal roots, less those that another of them replaces; and what they replace."""
    groups: dict[tuple[tuple[str, str], ...], list[Pack]] = defaultdict(list)
    for pack in packs:
        groups[tuple(sorted(pack.manifest.roots.items()))].append(pack)
    alike = max(groups.values(), key=len, default=[])
    gone = {name for pack in alike for name in pack.manifest.replaces}
    return [pack for pack in alike if pack.stored.digest not in gone], gone


class _FrameWriter:
    """Writes the frames of a compaction.

    Attributes:
        frames, files: written, as in the manifest.
        position: bytes written.
        hosts: the groups of host facts of all packs.
    """

    def __init__(self, upload: Upload, level: int, packs: list[Pack]) -> None:
        self.hosts: tuple[HostGroup, ...] = tuple(dict.fromkeys(group for p in packs for group in p.manifest.hosts))
        self.frames: list[Frame] = []
        self.files: list[PackedFile] = []
        self.position = 0
        self._upload = upload
        self._level = level

    def add_pack(
        self, pack: Pack, source: Readable, wanted: dict[tuple[str, int], list[PackedFile]], location: str
    ) -> None:
        """Write the frames of one pack, with those files that are ``wanted`` of (pack, frame)."""
        held = Counter(file.frame for file in pack.manifest.files)
        for index, frame in enumerate(pack.manifest.frames):
            members = sorted(wanted.get((pack.stored.name, index), []), key=lambda file: file.offset)
            members = [self._of_host(file, pack.manifest.hosts) for file in members]
            if not members:
                continue
            if len(members) == held[index]:
                self._write(_checked(source, frame, location), frame.raw_size, members)
            else:
                self._write(*compress_members(read_frame(source, frame, location), members, self._level))

    def _of_host(self, file: PackedFile, hosts: tuple[HostGroup, ...]) -> PackedFile:
        """The file with the index of its group in the new pack."""
        return file if file.host < 0 else file._replace(host=self.hosts.index(hosts[file.host]))

    def _write(self, content: bytes, raw_size: int, members: list[PackedFile]) -> None:
        self.frames.append(Frame(self.position, len(content), raw_size, hashlib.sha256(content).hexdigest()))
        self.files += [file._replace(frame=len(self.frames) - 1) for file in members]
        self.position += len(content)
        self._upload.write(content)


def _checked(source: Readable, frame: Frame, location: str) -> bytes:
    """The compressed bytes of a frame."""
    content = source.read(frame.offset, frame.size)
    if hashlib.sha256(content).hexdigest() != frame.sha256:
        raise CacheError(f"{location}: a frame is damaged: it is not put together with others")
    return content
