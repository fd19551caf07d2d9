"""A pack: a tar archive in zstd frames, whose last frame holds the manifest.

    frame 0 | frame 1 | … | end of archive | skippable frame: manifest (zstd), signature, lengths, magic

Each frame holds whole files, so frames are made and unpacked by several threads, and a reader fetches only those that
it needs. The manifest holds a digest of every frame, the signature is over the manifest, and the pack's name is the
digest of the manifest: whoever vouches for the manifest vouches for every byte. Nothing is decompressed before its
digest was found right. `zstd -d < pack | tar t` lists the files.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import zstandard

from ..cache_errors import CacheOperationInterrupted, CacheValidationError
from ..key import CacheKey
from ..space import mib
from ..stores.interface import SUFFIX, Readable, Store, Stored, Upload
from ..trust import Trust
from ..trust.signatures import MOST_BLOCK_BYTES
from . import tar
from .manifest import Frame, Manifest, PackedFile
from .scan import LocalFile

FRAME_BYTES = 8 << 20
"""Content that is put into one frame; a larger file has a frame of its own."""
_MAGIC = b"ELPACK01"
_SKIPPABLE = struct.Struct("<II")
_SKIPPABLE_MAGIC = 0x184D2A5E
_TRAILER = struct.Struct("<HQ8s")
_MOST_MANIFEST_BYTES = 1 << 28
LARGEST_FILE_BYTES = 1 << 32
"""Files of this size and more are not packed."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Pack:
    """A pack in a store whose manifest was verified.

    Attributes:
        by_signer: whether the key has signed it that signs now, and not an older one.
    """

    stored: Stored
    manifest: Manifest
    by_signer: bool = True


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
) -> Pack | None:
    """Pack ``files`` into the store; None when none of them could be read.

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
        if not packed:
            return None
        return finish_pack(upload, store, describe(tuple(packed), tuple(frames)), position, trust)


def finish_pack(upload: Upload, store: Store, manifest: Manifest, frames_bytes: int, trust: Trust) -> Pack:
    """Write what follows the frames, and make the pack visible.

    Raises:
        CacheValidationError: this node cannot sign, or the pack is on the deny-list.
    """
    tail, digest = _tail(manifest, store.name, trust)
    trust.check_pack(digest, manifest.created, f"the new pack {digest}")
    upload.write(tail)
    name = f"{manifest.key.prefix}/{digest}{SUFFIX}"
    upload.commit(name)
    return Pack(Stored(name, frames_bytes + len(tail), manifest.created), manifest)


def compress_members(content: bytes, members: list[PackedFile], level: int) -> tuple[bytes, int, list[PackedFile]]:
    """A new frame with some of the files of a frame's ``content``, its size before compression, and its files."""
    parts: list[bytes] = []
    moved: list[PackedFile] = []
    end = 0
    for file in members:
        size = len(file.head()) + file.size + tar.padding(file.size)
        parts.append(content[file.offset : file.offset + size])
        moved.append(file._replace(offset=end))
        end += size
    return _local.compressor(level).compress(b"".join(parts)), end, moved


def _tail(manifest: Manifest, store_name: str, trust: Trust) -> tuple[bytes, str]:
    """What follows the frames, and the digest that names the pack."""
    text = zstandard.ZstdCompressor(level=3).compress(manifest.to_json())
    signature = trust.sign(text, store=store_name)
    signed = text + signature + _TRAILER.pack(len(signature), len(text), _MAGIC)
    end = zstandard.ZstdCompressor().compress(tar.END)
    return end + _SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(signed)) + signed, hashlib.sha256(text).hexdigest()


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
    descriptor = os.open(file.local, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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


def read_manifest(store: Store, stored: Stored, key_prefix: str, trust: Trust) -> Pack:
    """Read a pack's manifest and verify it.

    Raises:
        CacheValidationError: damaged, cut short, forged, unsigned, denied, too old, or of another key.
        OSError: the store fails, or the pack is gone.
    """
    location = f"{store.description}/{stored.name}"
    with store.open(stored.name) as file:
        text, signature, tail_offset = _read_tail(file, location)
    trust.verify(text, signature, location, store=store.name)
    if hashlib.sha256(text).hexdigest() != stored.digest:
        raise CacheValidationError(f"{location}: refused: its content does not match its name")
    manifest = Manifest.from_json(
        decompress(text, _content_size(text, location, _MOST_MANIFEST_BYTES), location), location
    )
    if manifest.key.prefix != key_prefix:
        raise CacheValidationError(f"{location}: refused: it is a pack of another key, {manifest.key.prefix}")
    trust.check_pack(stored.digest, manifest.created, location)
    _check_end(store, stored, manifest, tail_offset, location)
    return Pack(stored, manifest, trust.is_by_signer(signature))


def _read_tail(file: Readable, location: str) -> tuple[bytes, bytes, int]:
    """The compressed manifest, its signature block, and where what follows the frames ends."""
    if file.size < _TRAILER.size + _SKIPPABLE.size:
        raise CacheValidationError(f"{location}: refused: it is cut short ({file.size} bytes)")
    guess = min(file.size, 64 << 10)  # most manifests come with the first read
    end = file.read(file.size - guess, guess)
    block_bytes, length, magic = _TRAILER.unpack(end[-_TRAILER.size :])
    begin = file.size - _TRAILER.size - block_bytes - length - _SKIPPABLE.size
    if magic != _MAGIC or length > _MOST_MANIFEST_BYTES or block_bytes > MOST_BLOCK_BYTES or begin < 0:
        raise CacheValidationError(f"{location}: refused: it is no pack, or is cut short")
    wanted = file.size - begin
    whole = end[-wanted:] if wanted <= guess else file.read(begin, wanted - guess) + end
    if _SKIPPABLE.unpack(whole[: _SKIPPABLE.size]) != (_SKIPPABLE_MAGIC, length + block_bytes + _TRAILER.size):
        raise CacheValidationError(f"{location}: refused: the frame of its manifest is damaged")
    text_end = _SKIPPABLE.size + length
    return whole[_SKIPPABLE.size : text_end], whole[text_end : text_end + block_bytes], begin


def _check_end(store: Store, stored: Stored, manifest: Manifest, tail_offset: int, location: str) -> None:
    """Between the last frame and the manifest stands the end of the archive, and nothing else."""
    frames_end = manifest.frames[-1].offset + manifest.frames[-1].size if manifest.frames else 0
    between = tail_offset - frames_end
    if 0 < between < tar.BLOCK:
        with store.open(stored.name) as file:
            if file.read(frames_end, between) == zstandard.ZstdCompressor().compress(tar.END):
                return
            content = file.read(frames_end, between)
        if decompress(content, len(tar.END), location) == tar.END:  # another version of zstd made it
            return
    raise CacheValidationError(f"{location}: refused: there is something in it that its manifest does not name")


def read_frame(file: Readable, frame: Frame, location: str) -> bytes:
    """A frame's content, verified before it is decompressed."""
    return decompress(read_compressed_frame(file, frame, location), frame.raw_size, location)


def read_compressed_frame(file: Readable, frame: Frame, location: str) -> bytes:
    """A frame as it lies in the pack, verified."""
    content = file.read(frame.offset, frame.size)
    if hashlib.sha256(content).hexdigest() != frame.sha256:
        raise CacheValidationError(f"{location}: refused: the frame at byte {frame.offset} is damaged or was changed")
    return content


def decompress(content: bytes, size: int, location: str) -> bytes:
    """Decompress ``content`` to exactly ``size`` bytes.

    Raises:
        CacheValidationError: it holds another size (as a decompression bomb does), or is damaged.
    """
    try:
        if _content_size(content, location, size) != size:
            raise CacheValidationError(f"{location}: refused: a frame holds another size than the manifest says")
        result = _local.decompressor().decompress(content, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CacheValidationError(f"{location}: refused: a frame cannot be decompressed: {error}") from None
    if len(result) != size:
        raise CacheValidationError(f"{location}: refused: a frame holds another size than the manifest says")
    return result


def _content_size(content: bytes, location: str, most: int) -> int:
    try:
        size = zstandard.get_frame_parameters(content).content_size
    except zstandard.ZstdError as error:
        raise CacheValidationError(f"{location}: refused: a frame cannot be decompressed: {error}") from None
    if size > most:
        raise CacheValidationError(f"{location}: refused: a frame of {len(content)} bytes would become {size} bytes")
    return size


class _PerThread(threading.local):
    """zstd's contexts, one of each kind a thread: they are slow to make, and must not be shared between threads."""

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        made: dict[int, zstandard.ZstdCompressor] = self.__dict__.setdefault("made", {})
        if level not in made:
            made[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
        return made[level]

    def decompressor(self) -> zstandard.ZstdDecompressor:
        if "reader" not in self.__dict__:
            self.reader = zstandard.ZstdDecompressor()
        return self.reader


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
