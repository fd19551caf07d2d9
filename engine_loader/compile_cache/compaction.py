"""Compaction: packs of a key are put together into one, which names those that it replaces.

It needs no lock, but one compactor at a time saves work (stores/leases). Pruning deletes replaced packs later
(retention). Damaged frames are left out. A damaged pack of whose files not even older copies are sound is not replaced.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .cache_errors import CacheError
from .host.groups import HostGroup
from .key import CacheKey
from .packs.key_packs import effective_files, living, read_key, update_index
from .packs.manifest import ANY_HOST, Frame, Manifest, PackedFile
from .packs.pack import DamagedFrameError, Pack, decompress, finish_pack, read_compressed
from .packs.packing import compress_members
from .packs.relocate import is_group_file, relocated
from .packs.tar import padding
from .stores.interface import Readable, Store, Upload
from .trust import Trust

_LARGE = 4
"""A pack so many times larger than all others together is not written again."""


class _UnusableError(Exception):
    """A frame, or a whole pack (``frame`` is None), cannot be put together with others."""

    def __init__(self, pack: Pack, frame: int | None = None) -> None:
        super().__init__(pack.stored.name, frame)
        self.pack, self.frame = pack, frame


def compact(store: Store, key: CacheKey, trust: Trust, *, level: int, more_than: int = 1) -> Pack | None:
    """Put packs of a key together into one, when there are more than ``more_than`` that no other replaces; None when
    there is nothing to do.

    Frames are copied as they are where all of their files still count. A pack that is far larger than the others
    stays as it is. Files that name their directories (Triton's group files) are rewritten for those of one pack.
    A damaged frame is left out, and older copies of its files are taken; so is a pack that cannot be read, which stays
    in the store.

    Raises:
        CacheOperationInterrupted: no room.
        OSError: the store fails.
    """
    found = read_key(store, key.prefix, trust)
    made = _around_damage(
        store, key, trust, living(found.packs), found.packs, level, lambda packs: _chosen(packs, max(more_than, 1))
    )
    if made is not None:
        update_index(store, key.prefix, trust, [*found.packs, made])
    return made


def salvage(store: Store, pack: Pack, trust: Trust, *, level: int) -> Pack | None:
    """A pack with what is sound in ``pack``, which it replaces; None when nothing is. Raises as ``compact``."""
    key = pack.manifest.key
    found = read_key(store, key.prefix, trust)
    made = _around_damage(store, key, trust, [pack], [pack, *found.packs], level, lambda packs: packs)
    if made is not None:
        update_index(store, key.prefix, trust, [*found.packs, made])
    return made


def _around_damage(
    store: Store,
    key: CacheKey,
    trust: Trust,
    packs: list[Pack],
    all_packs: list[Pack],
    level: int,
    choose: Callable[[list[Pack]], list[Pack]],
) -> Pack | None:
    """Put packs together, and again without what turns out damaged, until it is done."""
    damaged: set[tuple[str, int]] = set()
    while chosen := choose(packs):
        wanted: dict[tuple[str, int], list[PackedFile]] = defaultdict(list)
        for pack, file in effective_files(packs, damaged).values():
            wanted[pack.stored.name, file.frame].append(file)
        if lost := _lost(packs, damaged, wanted):
            packs = [pack for pack in packs if pack.stored.name not in lost]
            continue
        if not any(pack.stored.name == name for pack in chosen for name, _ in wanted):
            return None
        try:
            return _put_together(store, key, trust, chosen, all_packs, wanted, level)
        except _UnusableError as error:
            if error.frame is None:
                packs = [pack for pack in packs if pack is not error.pack]
            else:
                damaged.add((error.pack.stored.name, error.frame))
    return None


def _lost(
    packs: list[Pack], damaged: set[tuple[str, int]], wanted: dict[tuple[str, int], list[PackedFile]]
) -> set[str]:
    """Names of damaged packs of which no file, nor an older copy of one, is wanted: such a pack is not replaced."""
    paths = {file.path for files in wanted.values() for file in files}
    suspected = {name for name, _ in damaged}
    return {
        pack.stored.name
        for pack in packs
        if pack.stored.name in suspected and all(file.path not in paths for file in pack.manifest.files)
    }


def _chosen(packs: list[Pack], more_than: int) -> list[Pack]:
    """Which packs are put together: all, without one that is far larger than the rest."""
    if len(packs) <= more_than:
        return []
    largest = max(packs, key=lambda pack: pack.stored.size)
    rest = [pack for pack in packs if pack is not largest]
    return rest if len(rest) > 1 and largest.stored.size > _LARGE * sum(pack.stored.size for pack in rest) else packs


def _put_together(
    store: Store,
    key: CacheKey,
    trust: Trust,
    chosen: list[Pack],
    all_packs: list[Pack],
    wanted: dict[tuple[str, int], list[PackedFile]],
    level: int,
) -> Pack:
    with store.upload(key.prefix) as upload:
        roots = _roots_of(chosen)
        writer = _FrameWriter(upload, level, roots)
        for pack in chosen:
            location = f"{store.description}/{pack.stored.name}"
            with _opened(store, pack) as source:
                writer.add_pack(pack, source, wanted, location)
        # As old as the newest of those that it replaces: what was saved meanwhile is newer.
        manifest = Manifest(
            key=key,
            created=max(pack.manifest.created for pack in chosen),
            files=tuple(writer.files),
            frames=tuple(writer.frames),
            host=socket.gethostname(),
            roots=roots,
            factors={path: value for pack in reversed(chosen) for path, value in pack.manifest.factors.items()},
            replaces=tuple(sorted({name for pack in chosen for name in (pack.stored.digest, *pack.manifest.replaces)})),
            hosts=tuple(writer.hosts),
        )
        # A pack with these files may be among those that are replaced.
        return finish_pack(upload, store, manifest, trust, {pack.stored.digest for pack in all_packs})


@contextmanager
def _opened(store: Store, pack: Pack) -> Iterator[Readable]:
    with ExitStack() as stack:
        try:
            source = stack.enter_context(store.open(pack.stored.name))
        except (OSError, CacheError) as error:
            raise _UnusableError(pack) from error
        yield source


def _roots_of(chosen: list[Pack]) -> dict[str, str]:
    """The directories of the largest pack with files that name them, so that most need not be rewritten."""
    naming = [pack for pack in chosen if any(is_group_file(file.path) for file in pack.manifest.files)]
    return dict(max(naming or chosen, key=lambda pack: pack.stored.size).manifest.roots)


class _FrameWriter:
    """Writes the frames of a compaction.

    Attributes:
        frames, files, hosts: written, as in the manifest.
        position: bytes written.
    """

    def __init__(self, upload: Upload, level: int, roots: Mapping[str, str]) -> None:
        self.frames: list[Frame] = []
        self.files: list[PackedFile] = []
        self.hosts: list[HostGroup] = []
        self.position = 0
        self._upload = upload
        self._level = level
        self._roots = roots

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
            names_others = pack.manifest.roots != self._roots and any(is_group_file(file.path) for file in members)
            content = _content(pack, source, frame, location)
            if is_whole and not names_others:
                self._write(content, frame.raw_size, moved)
                continue
            try:
                content = decompress(content, frame.raw_size, location)
            except CacheError as error:
                raise _UnusableError(pack) from error
            if names_others:
                content, moved = _relocated(content, moved, pack.manifest.roots, self._roots)
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


def _relocated(
    content: bytes, members: list[PackedFile], old: Mapping[str, str], new: Mapping[str, str]
) -> tuple[bytes, list[PackedFile]]:
    """A frame's members with the directories in group files rewritten, one behind another."""
    targets = {name: Path(path) for name, path in new.items()}
    parts: list[bytes] = []
    moved: list[PackedFile] = []
    end = 0
    for file in members:
        begin = file.offset + len(file.head())
        data = content[begin : begin + file.size]
        if is_group_file(file.path) and not file.link:
            data = relocated(data, old, targets)
            file = file._replace(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        parts += [file.head(), data, bytes(padding(file.size))]
        moved.append(file._replace(offset=end))
        end += sum(map(len, parts[-3:]))
    return b"".join(parts), moved


def _content(pack: Pack, source: Readable, frame: Frame, location: str) -> bytes:
    """The compressed bytes of a frame."""
    try:
        return read_compressed(source, frame, location)
    except DamagedFrameError as error:
        raise _UnusableError(pack, pack.manifest.frames.index(frame)) from error
    except (OSError, CacheError) as error:
        raise _UnusableError(pack) from error
