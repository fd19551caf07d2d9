"""The index of a key: the ends of all its packs in one object, and small packs as a whole, so that a restore need not
open each pack.

    magic | size of the table (4 bytes) | table (JSON): [[digest, size, version, bytes of its end], …] | the ends

It is no authority. Everything in it is verified as if it were read from the packs, packs that a listing shows and the
index lacks are read one by one, and what the listing lacks is passed over.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ..cache_errors import CacheValidationError
from ..stores.interface import Store, Stored
from ..stores.object_names import INDEX
from .pack import Pack

MOST_BYTES = 256 << 20
_MAGIC = b"ELINDEX2"
_HEAD = struct.Struct("<8sI")
_MOST_PACKS = 10_000
_MOST_WHOLE_BYTES = 4 << 20

Ends = dict[tuple[str, int, str], bytes]
"""(digest, size, version) of a pack -> everything behind its frames, or all of it."""


def encode(packs: Sequence[Pack]) -> bytes:
    """The index of these packs. Those that would make it larger than ``MOST_BYTES`` are left out, and small ones stand
    in it as a whole, as long as they are few.
    """
    gone = {name for pack in packs for name in pack.manifest.replaces}
    table: list[tuple[str, int, str, int]] = []
    parts: list[bytes] = []
    size = whole_bytes = 0
    for pack in sorted(packs, key=lambda pack: pack.stored.name):
        part = pack.tail
        if pack.stored.digest not in gone and whole_bytes + len(pack.whole) <= _MOST_WHOLE_BYTES:
            part = pack.whole or pack.tail
            whole_bytes += len(pack.whole)
        if size + len(part) <= MOST_BYTES - (1 << 20) and len(table) < _MOST_PACKS:
            table.append((pack.stored.digest, pack.stored.size, pack.stored.version, len(part)))
            parts.append(part)
            size += len(part)
    text = json.dumps(table, separators=(",", ":")).encode()
    return b"".join([_HEAD.pack(_MAGIC, len(text)), text, *parts])


def decode(content: bytes) -> Ends:
    """What an index has of packs; nothing where it is damaged."""
    found: Ends = {}
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


def read_ends(store: Store, entries: Iterable[Stored], prefix: str) -> Ends:
    """What the index of a key has; nothing where there is no index, or it cannot be read."""
    name = f"{prefix}/{INDEX}"
    if all(entry.name != name for entry in entries):
        return {}
    try:
        return decode(store.read(name, MOST_BYTES).content)
    except (OSError, CacheValidationError):
        return {}
