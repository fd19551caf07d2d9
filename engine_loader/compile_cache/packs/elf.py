"""Compiled code that is cut short, as a linker leaves it that was killed while it wrote.

Compilers that cache by a file's mere existence, as inductor does, load such a file again and again, and fail. Facts are
those of the ELF-64 header (``e_shoff`` at 0x28, ``e_shentsize`` and ``e_shnum`` at 0x3A).
"""

from __future__ import annotations

import struct

_SUFFIXES = (".so", ".cubin", ".hsaco")
_HEADER_BYTES = 64
_LITTLE_64 = b"\x7fELF\x02\x01"


def is_cut_short(path: str, size: int) -> bool:
    """Whether a library or GPU binary ends before the section headers that its own header names.

    Args:
        path: of the file; only names as compilers give them are looked at.
        size: its length, in bytes.

    Raises:
        OSError: it cannot be read.
    """
    if not path.endswith(_SUFFIXES):
        return False
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_LITTLE_64[: len(header)]):
        return False
    if len(header) < _HEADER_BYTES:
        return True
    (sections,) = struct.unpack_from("<Q", header, 0x28)
    each, count = struct.unpack_from("<2H", header, 0x3A)
    return bool(sections + each * count > size)
