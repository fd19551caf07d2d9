"""Compaction: the packs of a key are put together into one, which names those that it replaces.

It needs no lock: pruning deletes replaced packs later (retention).
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .cache_errors import CacheError
from .key import CacheKey
from .packs.key_packs import effective_files, read_packs
from .packs.manifest import Frame, Manifest, PackedFile
from .packs.pack import DamagedFrameError, Pack, compress_members, decompress, finish_pack, read_compressed
from .stores.interface import Readable, Store, Upload
from .trust import Trust


def compact(store: Store, key: CacheKey, trust: Trust, *, level: int, more_than: int = 1) -> Pack | None:
    """Put the packs of a key together into one, when there are more than ``more_than``; None when there is nothing to
    do.

    Frames are copied as they are where all of their files still count. Only packs whose caches had the same
    directories are put together, for Triton's files name them. A damaged frame is left out, and older copies of its
    files are taken; so is a pack that cannot be read, which stays in the store.

    Raises:
        CacheOperationInterrupted: no room.
        OSError: the store fails.
    """
    packs, gone = _packs_alike(read_packs(store, key, trust, []))
    return _around_damage(store, key, trust, packs, gone, level, more_than)


def salvage(store: Store, pack: Pack, trust: Trust, *, level: int) -> Pack | None:
    """A pack with what is sound in ``pack``, which it replaces; None when nothing is. Raises as ``compact``."""
    return _around_damage(store, pack.manifest.key, trust, [pack], set(pack.manifest.replaces), level, 0)


def _around_damage(
    store: Store, key: CacheKey, trust: Trust, packs: list[Pack], gone: set[str], level: int, more_than: int
) -> Pack | None:
    """Put packs together, and again without what turns out damaged, until it is done."""
    damaged: set[tuple[str, int]] = set()
    while len(packs) > more_than:
        wanted: dict[tuple[str, int], list[PackedFile]] = defaultdict(list)
        for pack, file in effective_files(packs, damaged).values():
            wanted[pack.stored.name, file.frame].append(file)
        try:
            return _put_together(store, key, trust, packs, gone, wanted, level)
        except _UnusableError as error:
            if error.frame is None:
                packs = [pack for pack in packs if pack is not error.pack]
            else:
                damaged.add((error.pack.stored.name, error.frame))
    return None


def _put_together(
    store: Store,
    key: CacheKey,
    trust: Trust,
    packs: list[Pack],
    gone: set[str],
    wanted: dict[tuple[str, int], list[PackedFile]],
    level: int,
) -> Pack | None:
    if not wanted:
        return None
    with store.upload(key.prefix) as upload:
        writer = _FrameWriter(upload, level)
        for pack in packs:
            location = f"{store.description}/{pack.stored.name}"
            with _opened(store, pack) as source:
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
        )
        return finish_pack(upload, manifest, writer.position, trust)


class _UnusableError(Exception):
    """A frame, or a whole pack (``frame`` is None), cannot be put together with others."""

    def __init__(self, pack: Pack, frame: int | None = None) -> None:
        super().__init__(pack.stored.name, frame)
        self.pack, self.frame = pack, frame


@contextmanager
def _opened(store: Store, pack: Pack) -> Iterator[Readable]:
    with ExitStack() as stack:
        try:
            source = stack.enter_context(store.open(pack.stored.name))
        except (OSError, CacheError) as error:
            raise _UnusableError(pack) from error
        yield source


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
    """

    def __init__(self, upload: Upload, level: int) -> None:
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
            if not members:
                continue
            try:
                content = read_compressed(source, frame, location)
                if len(members) < held[index]:
                    plain = decompress(content, frame.raw_size, location)
            except DamagedFrameError as error:
                raise _UnusableError(pack, index) from error
            except (OSError, CacheError) as error:
                raise _UnusableError(pack) from error
            if len(members) == held[index]:
                self._write(content, frame.raw_size, members)
            else:
                self._write(*compress_members(plain, members, self._level))

    def _write(self, content: bytes, raw_size: int, members: list[PackedFile]) -> None:
        self.frames.append(Frame(self.position, len(content), raw_size, hashlib.sha256(content).hexdigest()))
        self.files += [file._replace(frame=len(self.frames) - 1) for file in members]
        self.position += len(content)
        self._upload.write(content)
