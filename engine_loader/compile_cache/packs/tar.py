"""The head of one file in a tar archive (PAX, with nanoseconds), the same bytes for the same facts.

`zstd -d < pack | tar t` works by these headers. Readers of this package do not *parse* them: they make the header that
the manifest calls for, and compare.
"""

from __future__ import annotations

BLOCK = 512
_MOST_OCTAL = 8**11 - 1  # what the field for seconds holds; the PAX record has the time as it is
END = bytes(2 * BLOCK)
"""What closes an archive."""


def padding(size: int) -> int:
    """How many zero bytes follow a file's content."""
    return -size % BLOCK


def header_size(path: str, mtime_ns: int, link: str = "") -> int:
    """The length of ``header`` for the same facts, without making it."""
    size = len(_records(path, mtime_ns, link))
    return 2 * BLOCK + size + padding(size)


def header(path: str, size: int, mtime_ns: int, mode: int, link: str = "") -> bytes:
    """Everything that stands before the content of a regular file, or of a symbolic link to ``link``."""
    records = _records(path, mtime_ns, link)
    name, target = path.encode("utf-8", "surrogateescape"), link.encode("utf-8", "surrogateescape")
    kind = b"2" if link else b"0"
    return (
        _block(b"PaxHeaders/" + name[-80:], len(records), 0, 0o644, b"x", b"")
        + records
        + bytes(padding(len(records)))
        + _block(name[:100], size, mtime_ns // 10**9, mode, kind, target[:100])
    )


def _records(path: str, mtime_ns: int, link: str) -> bytes:
    """What the old fields of a header have no room for."""
    records = _record("mtime", f"{mtime_ns // 10**9}.{mtime_ns % 10**9:09}")
    if len(path.encode("utf-8", "surrogateescape")) > 100:
        records += _record("path", path)
    if len(link.encode("utf-8", "surrogateescape")) > 100:
        records += _record("linkpath", link)
    return records


def _record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    size = len(text) + 1
    while size != len(text) + len(str(size)):  # a record's length counts its own digits
        size = len(text) + len(str(size))
    return str(size).encode() + text


def _block(name: bytes, size: int, mtime: int, mode: int, kind: bytes, link: bytes) -> bytes:
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        name.ljust(100, b"\0"),
        mode,
        0,
        0,
        size,
        min(max(mtime, 0), _MOST_OCTAL),
    )
    tail = b"%s%s%s" % (kind, link.ljust(100, b"\0"), b"ustar\00000")
    block = (head + b" " * 8 + tail).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
