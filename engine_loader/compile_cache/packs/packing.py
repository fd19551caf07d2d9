"""Packing: local files are put together into frames by several threads, and the frames into a pack."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import zstandard

from ..cache_errors import CacheOperationInterrupted
from ..key import CacheKey
from ..space import mib
from ..stores.interface import Store
from ..trust import Trust
from . import tar
from .manifest import Frame, Manifest, PackedFile
from .pack import Pack, finish_pack
from .scan import LocalFile, open_unchanged

FRAME_BYTES = 8 << 20
"""Content that is put into one frame; a larger file has a frame of its own."""
LARGEST_FILE_BYTES = 1 << 32
"""Files of this size and more are not packed."""

_T = TypeVar("_T")
_R = TypeVar("_R")


class FileChanged(Exception):
    """A file was changed or removed while it was being packed: it is left for the next save."""


def write_pack(
    store: Store,
    describe: Callable[[tuple[PackedFile, ...], tuple[Frame, ...]], Manifest],
    key: CacheKey,
    files: Sequence[LocalFile],
    trust: Trust,
    *,
    threads: int,
    level: int,
    most_bytes: int,
    avoid: Callable[[], Collection[str]] = frozenset,
    is_wanted: Callable[[Sequence[PackedFile]], bool] = lambda _: True,
) -> Pack | None:
    """Pack ``files`` into the store; None when none of them could be read, or the pack is not wanted any more.

    Args:
        avoid: gives digests that the pack must not be named by.
        is_wanted: asked with the packed files before the pack becomes visible.

    Raises:
        CacheOperationInterrupted: the pack would be larger than ``most_bytes``, or there is no room for it.
        OSError: the store fails.
    """
    packed: list[PackedFile] = []
    frames: list[Frame] = []
    position = 0
    with store.upload(key.prefix) as upload:
        for content, raw_size, members in _in_order(lambda group: _make_frame(group, level), _grouped(files), threads):
            if not members:
                continue
            frames.append(Frame(position, len(content), raw_size, hashlib.sha256(content).hexdigest()))
            packed += [member._replace(frame=len(frames) - 1) for member in members]
            position += len(content)
            if position > most_bytes:
                raise CacheOperationInterrupted(
                    f"the pack would be larger than {mib(most_bytes)}; "
                    "raise compile_cache.max_pack_bytes (MAX_CACHE_SIZE_MB)"
                )
            upload.write(content)
        if not packed or not is_wanted(packed):
            return None
        return finish_pack(upload, store, describe(tuple(packed), tuple(frames)), trust, avoid())


def compress_members(content: bytes, members: list[PackedFile], level: int) -> tuple[bytes, int, list[PackedFile]]:
    """A new frame with some of the files of a frame's ``content``, its size before compression, and its files."""
    parts: list[bytes] = []
    moved: list[PackedFile] = []
    end = 0
    for file in members:
        size = file.packed_size()
        parts.append(content[file.offset : file.offset + size])
        moved.append(file._replace(offset=end))
        end += size
    return _local.compressor(level).compress(b"".join(parts)), end, moved


def _grouped(files: Sequence[LocalFile]) -> Iterator[list[LocalFile]]:
    group: list[LocalFile] = []
    size = 0
    for file in files:
        if file.size >= LARGEST_FILE_BYTES:  # it has grown since
            continue
        if group and size + file.size > FRAME_BYTES:
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size + 2 * tar.BLOCK
    if group:
        yield group


def _make_frame(group: list[LocalFile], level: int) -> tuple[bytes, int, list[PackedFile]]:
    """The compressed frame, its size before that, and its files. Files that change meanwhile are left out."""
    heads = [tar.header(file.path, file.size, file.mtime_ns, file.mode, file.link) for file in group]
    room = bytearray(
        sum(len(head) + file.size + tar.padding(file.size) for head, file in zip(heads, group, strict=True))
    )
    view = memoryview(room)
    members: list[PackedFile] = []
    end = 0
    for head, file in zip(heads, group, strict=True):
        content = view[end + len(head) : end + len(head) + file.size]
        try:
            if not file.link:
                _read_into(content, file)
        except (FileChanged, OSError):
            continue
        view[end : end + len(head)] = head
        digest = "" if file.link else hashlib.sha256(content).hexdigest()
        members.append(PackedFile(file.path, file.size, file.mtime_ns, file.mode, digest, 0, end, file.link))
        pad = tar.padding(file.size)
        end += len(head) + file.size
        view[end : end + pad] = bytes(pad)  # a file that was left out may have left something there
        end += pad
    if not members:
        return b"", 0, []
    return _local.compressor(level).compress(view[:end]), end, members


def _read_into(room: memoryview, file: LocalFile) -> None:
    descriptor = open_unchanged(file)
    try:
        done = 0
        while done < len(room):
            count = os.readv(descriptor, [room[done:]])
            if not count:
                raise FileChanged(file.path)
            done += count
        facts = os.fstat(descriptor)
        if facts.st_size != file.size or facts.st_mtime_ns != file.mtime_ns:
            raise FileChanged(file.path)
    finally:
        os.close(descriptor)


class _PerThread(threading.local):
    """zstd's contexts, one a level and thread: they are slow to make, and must not be shared between threads."""

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        made: dict[int, zstandard.ZstdCompressor] = self.__dict__.setdefault("made", {})
        if level not in made:
            made[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
        return made[level]


_local = _PerThread()


def _in_order(do: Callable[[_T], _R], items: Iterable[_T], threads: int) -> Iterator[_R]:
    """``map`` by several threads with a bounded number of results that wait."""
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="compile-cache") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(do, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
