"""A pack: a tar archive in zstd frames, whose last frame holds the manifest.

    frame 0 | frame 1 | … | end of archive | skippable frame: manifest (zstd) | signature block | trailer
    trailer: SHA-256 of the compressed manifest, its size (8 bytes), the block's size (4 bytes), magic

Each frame holds whole files, so frames are made and unpacked by several threads, and a reader fetches only those that
it needs. The signature covers the store's name, the pack's name, and the manifest's digest; the manifest holds a digest
of every frame: whoever vouches for the manifest vouches for every byte. Nothing is decompressed before its digest was
found right, and the signature is verified before the manifest is fetched. The pack's name is the digest of its content
(``Manifest.digest``), so equal saves are one pack. `zstd -d < pack | tar t` lists the files.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import zstandard

from ..cache_errors import CacheValidationError
from ..stores.interface import Readable, Store, Stored, Upload
from ..stores.object_names import SUFFIX
from ..trust import Trust
from ..trust.signatures import MOST_BLOCK_BYTES
from . import tar
from .manifest import FORMAT, Frame, Manifest

_MAGIC = b"ELPACK02"
_OTHER_FORMATS = {b"ELPACK01"}
_SKIPPABLE = struct.Struct("<II")
_SKIPPABLE_MAGIC = 0x184D2A5E
_TRAILER = struct.Struct("<32sQI8s")
SMALL_BYTES = 256 << 10
"""Packs up to this size are fetched and kept in the index as a whole."""
_FIRST_READ_BYTES = 64 << 10  # most manifests come with the first read
_MOST_TEXT_BYTES = 32 << 20
_MOST_MANIFEST_BYTES = 1 << 28
MOST_AHEAD_S = 86400.0
"""A pack that was made so much later than the store's time is refused: its saver's clock was wrong."""


@dataclass(frozen=True)
class Pack:
    """A pack in a store whose manifest was verified.

    Attributes:
        by_signer: whether the key has signed it that signs now, and not an older one.
    """

    stored: Stored
    manifest: Manifest
    tail: bytes = field(default=b"", repr=False, compare=False)
    """Everything behind the frames, as it lies in the store."""
    whole: bytes = field(default=b"", repr=False, compare=False)
    """All of a small pack, where it is at hand."""
    by_signer: bool = True


class EndReader:
    """A pack of which the end, or all, is at hand."""

    def __init__(self, stored: Stored, end: bytes) -> None:
        self.size = stored.size
        self._end = end
        self._begin = stored.size - len(end)

    @property
    def is_whole(self) -> bool:
        """Whether all of the pack is at hand."""
        return self._begin == 0

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        return

    def read(self, offset: int, size: int) -> bytes:
        # The first read is of a guessed size: what lies before the end is not looked at.
        missing = min(max(self._begin - offset, 0), size)
        begin = offset + missing - self._begin
        content = bytes(missing) + self._end[begin : begin + size - missing]
        if len(content) != size:
            raise OSError("less than the end of the pack is at hand")
        return content


class DamagedFrameError(CacheValidationError):
    """The bytes of a frame are not those that the pack's manifest names; the pack's other frames may be sound."""


def finish_pack(upload: Upload, store: Store, manifest: Manifest, trust: Trust, avoid: Collection[str] = ()) -> Pack:
    """Write what follows the frames, and make the pack visible; where it was this process that did, with its tail.

    Args:
        avoid: digests that name other packs than this one, which a reader refuses: the next generation is written.

    Raises:
        CacheValidationError: this node cannot sign, or the pack is on the deny-list.
    """
    digest = manifest.digest
    trust.check_pack(manifest.names, manifest.created, f"the new pack {digest}", now=store.known_time())
    while digest in avoid:
        manifest = replace(manifest, generation=manifest.generation + 1)
        digest = manifest.digest
        trust.check_pack(manifest.names, manifest.created, f"the new pack {digest}", now=store.known_time())
    name = f"{manifest.key.prefix}/{digest}{SUFFIX}"
    tail = make_tail(manifest.to_json(), store.name, name, trust)
    upload.write(tail)
    stored = upload.commit(name)
    size = manifest.frames_bytes + len(tail)
    if stored is None or size <= SMALL_BYTES:
        # Where the name existed, an equal pack with another tail lies there; a small one is read as a whole.
        return Pack(stored or Stored(name, size, manifest.created), manifest)
    return Pack(stored, manifest, tail)


def make_tail(manifest: bytes, store_name: str, pack_name: str, trust: Trust) -> bytes:
    """What follows the frames of a pack, with its manifest as JSON."""
    text = zstandard.ZstdCompressor(level=3).compress(manifest)
    digest = hashlib.sha256(text).digest()
    block = trust.sign(_signed(store_name, pack_name, digest, len(text)), store=store_name)
    trailer = _TRAILER.pack(digest, len(text), len(block), _MAGIC)
    end = zstandard.ZstdCompressor().compress(tar.END)
    head = _SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(text) + len(block) + len(trailer))
    return end + head + text + block + trailer


def _signed(store_name: str, pack_name: str, digest: bytes, size: int) -> bytes:
    """What a signature covers: the manifest, and which pack of which store it is."""
    return json.dumps([FORMAT, store_name, pack_name, digest.hex(), size], separators=(",", ":")).encode()


def read_manifest(store: Store, stored: Stored, key_prefix: str, trust: Trust) -> Pack:
    """Read a pack's manifest and verify it.

    Raises:
        CacheValidationError: damaged, cut short, forged, unsigned, denied, too old, of another key or store, or made
            in the future.
        OSError: the store fails, or the pack is gone.
    """
    with store.open(stored.name) as file:
        if 0 < file.size == stored.size <= SMALL_BYTES:
            file = EndReader(stored, file.read(0, file.size))
        return verified_pack(store, file, stored, key_prefix, trust)


@contextmanager
def open_pack(store: Store, pack: Pack) -> Iterator[Readable]:
    """A pack for reading its frames: from memory where it is there."""
    if pack.whole:
        yield EndReader(pack.stored, pack.whole)
        return
    with store.open(pack.stored.name) as file:
        yield file


def verified_pack(store: Store, file: Readable, stored: Stored, key_prefix: str, trust: Trust) -> Pack:
    """The pack whose end ``file`` holds. Raises as ``read_manifest``; the error says what is known of it."""
    seen = _Seen()
    try:
        return _verified(store, file, stored, key_prefix, trust, seen)
    except CacheValidationError as error:
        error.is_signed = seen.is_signed
        raise


@dataclass
class _Seen:
    """What the end of a file has shown so far."""

    is_signed: bool = False


def _verified(store: Store, file: Readable, stored: Stored, key_prefix: str, trust: Trust, seen: _Seen) -> Pack:
    location = f"{store.description}/{stored.name}"
    text, begin, by_signer = _read_text(file, store.name, stored.name, trust, location, seen)
    manifest = Manifest.from_json(
        decompress(text, _content_size(text, location, _MOST_MANIFEST_BYTES), location), location
    )
    if manifest.key.prefix != key_prefix:
        raise CacheValidationError(f"{location}: refused: it is a pack of another key, {manifest.key.prefix}")
    if manifest.digest != stored.digest:
        raise CacheValidationError(f"{location}: refused: its content does not match its name")
    if (ahead_s := manifest.created - store.known_time()) > MOST_AHEAD_S:
        raise CacheValidationError(
            f"{location}: refused: it was made in the future, on a machine whose clock was wrong: its time is "
            f"{ahead_s:.0f} s after the store's"
        )
    trust.check_pack(manifest.names, manifest.created, location, now=store.known_time())
    frames_end = manifest.frames_bytes
    between = begin - frames_end
    if not 0 < between < tar.BLOCK:
        raise CacheValidationError(f"{location}: refused: there is something in it that its manifest does not name")
    tail = file.read(frames_end, file.size - frames_end)
    _check_end(tail[:between], location)
    return Pack(stored, manifest, tail, _whole(file, manifest), by_signer)


def _whole(file: Readable, manifest: Manifest) -> bytes:
    """All of a pack, where it is in memory and undamaged."""
    if not isinstance(file, EndReader) or not file.is_whole:
        return b""
    content = file.read(0, file.size)
    sound = all(
        hashlib.sha256(content[frame.offset : frame.offset + frame.size]).hexdigest() == frame.sha256
        for frame in manifest.frames
    )
    return content if sound else b""


def _read_text(
    file: Readable, store_name: str, pack_name: str, trust: Trust, location: str, seen: _Seen
) -> tuple[bytes, int, bool]:
    """The compressed manifest, where what follows the frames' end begins, and whether the key that signs now has signed
    it. A signature that is wrong costs one small read.
    """
    least = _TRAILER.size + _SKIPPABLE.size
    if file.size < least:
        raise CacheValidationError(f"{location}: refused: it is cut short ({file.size} bytes)")
    guess = min(file.size, _FIRST_READ_BYTES)
    end = file.read(file.size - guess, guess)
    digest, length, block_size, magic = _TRAILER.unpack(end[-_TRAILER.size :])
    begin = file.size - _TRAILER.size - block_size - length - _SKIPPABLE.size
    if magic in _OTHER_FORMATS:
        raise CacheValidationError(f"{location}: refused: it has the format of another version, {magic.decode()}")
    if magic != _MAGIC or length > _MOST_TEXT_BYTES or block_size > MOST_BLOCK_BYTES or begin < 0:
        raise CacheValidationError(f"{location}: refused: it is not a pack, or is cut short")
    block = end[-_TRAILER.size - block_size : -_TRAILER.size]
    trust.verify(_signed(store_name, pack_name, digest, length), block, location, store=store_name)
    seen.is_signed = trust.signed
    wanted = file.size - begin
    whole = end[-wanted:] if wanted <= guess else file.read(begin, wanted - guess) + end
    if _SKIPPABLE.unpack(whole[: _SKIPPABLE.size]) != (_SKIPPABLE_MAGIC, wanted - _SKIPPABLE.size):
        raise CacheValidationError(f"{location}: refused: the frame of its manifest is damaged")
    text = whole[_SKIPPABLE.size : _SKIPPABLE.size + length]
    if hashlib.sha256(text).digest() != digest:
        raise CacheValidationError(f"{location}: refused: its manifest is damaged or was changed")
    return text, begin, trust.is_by_signer(block)


def _check_end(between: bytes, location: str) -> None:
    """Between the last frame and the manifest stands the end of the archive, and nothing else."""
    if between != zstandard.ZstdCompressor().compress(tar.END):
        if decompress(between, len(tar.END), location) == tar.END:  # another version of zstd made it
            return
        raise CacheValidationError(f"{location}: refused: there is something in it that its manifest does not name")


def read_compressed(file: Readable, frame: Frame, location: str) -> bytes:
    """A frame as it lies in the pack, verified.

    Raises:
        DamagedFrameError: its digest is not the one in the manifest.
        OSError: the store fails.
    """
    content = file.read(frame.offset, frame.size)
    if hashlib.sha256(content).hexdigest() != frame.sha256:
        raise DamagedFrameError(f"{location}: refused: the frame at byte {frame.offset} is damaged or was changed")
    return content


def read_frame(file: Readable, frame: Frame, location: str) -> bytes:
    """A frame's content, verified before it is decompressed. Raises as ``read_compressed`` and ``decompress``."""
    return decompress(read_compressed(file, frame, location), frame.raw_size, location)


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
    """zstd's context, one a thread: it is slow to make, and must not be shared between threads."""

    def decompressor(self) -> zstandard.ZstdDecompressor:
        if "reader" not in self.__dict__:
            self.reader = zstandard.ZstdDecompressor()
        return self.reader


_local = _PerThread()
