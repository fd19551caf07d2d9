"""The index of a key: the ends of all its packs in one object, so that a restore need not open each pack.

    magic | size of the table (4 bytes) | table (JSON): [[digest, size, version, bytes of its tail], …] | the tails

It is no authority. Every tail is verified as if it were read from the pack, packs that a listing shows and the index
lacks are read one by one, and what the listing lacks is passed over.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ..cache_errors import CacheValidationError
from ..stores.interface import Store, Stored
from ..stores.names import INDEX
from .pack import Pack

MOST_BYTES = 256 << 20
_MAGIC = b"ELINDEX2"
_HEAD = struct.Struct("<8sI")
_MOST_PACKS = 10_000

Tails = dict[tuple[str, int, str], bytes]
"""(digest, size, version) of a pack -> everything behind its frames."""


class TailReader:
    """A pack of which only the end is at hand."""

    def __init__(self, stored: Stored, tail: bytes) -> None:
        self.size = stored.size
        self._tail = tail
        self._begin = stored.size - len(tail)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        return

    def read(self, offset: int, size: int) -> bytes:
        # The first read is of a guessed size: what lies before the tail is never looked at.
        missing = min(max(self._begin - offset, 0), size)
        begin = offset + missing - self._begin
        content = bytes(missing) + self._tail[begin : begin + size - missing]
        if len(content) != size:
            raise OSError("the index holds less than the end of the pack")
        return content


def encode(packs: Iterable[Pack]) -> bytes:
    """The index of these packs. Those that would make it larger than ``MOST_BYTES`` are left out."""
    table: list[tuple[str, int, str, int]] = []
    tails: list[bytes] = []
    size = 0
    for pack in sorted(packs, key=lambda pack: pack.stored.name):
        if size + len(pack.tail) <= MOST_BYTES - (1 << 20) and len(table) < _MOST_PACKS:
            table.append((pack.stored.digest, pack.stored.size, pack.stored.version, len(pack.tail)))
            tails.append(pack.tail)
            size += len(pack.tail)
    text = json.dumps(table, separators=(",", ":")).encode()
    return b"".join([_HEAD.pack(_MAGIC, len(text)), text, *tails])


def decode(content: bytes) -> Tails:
    """The tails in an index; none where it is damaged."""
    found: Tails = {}
    with suppress(struct.error, ValueError, TypeError):
        magic, size = _HEAD.unpack_from(content)
        if magic != _MAGIC:
            return {}
        position = _HEAD.size + size
        for digest, pack_size, version, length in json.loads(content[_HEAD.size : position])[:_MOST_PACKS]:
            if type(length) is int and 0 < length <= min(pack_size, len(content) - position):
                found[str(digest), int(pack_size), str(version)] = content[position : position + length]
                position += length
    return found


def read_tails(store: Store, entries: Iterable[Stored], prefix: str) -> Tails:
    """The tails in the index of a key; none where there is no index, or it cannot be read."""
    name = f"{prefix}/{INDEX}"
    if all(entry.name != name for entry in entries):
        return {}
    try:
        return decode(store.read(name, MOST_BYTES).content)
    except (OSError, CacheValidationError):
        return {}
