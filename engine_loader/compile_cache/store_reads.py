"""What was read of a store in a directory, so that it can be read into the page cache before the next start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

Reads: TypeAlias = dict[str, list[tuple[int, int]]]
"""Name of an object, or its path -> (offset, size) in bytes of what was read of it; nothing: it was only listed."""
_GAP_BYTES = 64 << 10


def joined_ranges(ranges: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """(offset, size) ranges in the order of the file, those that meet or nearly do as one."""
    found: list[tuple[int, int]] = []
    for offset, size in sorted((one[0], one[1]) for one in ranges):
        begin, length = found[-1] if found else (offset, 0)
        if offset <= begin + length + _GAP_BYTES:
            found[-1:] = [(begin, max(length, offset + size - begin))]
        else:
            found.append((offset, size))
    return found


def joined_reads(*reads: Mapping[str, Iterable[Sequence[int]]]) -> Reads:
    """What was read in several pieces or by several restores, each range once; names as they were first read."""
    found: dict[str, list[Sequence[int]]] = {}
    for one in reads:
        for name, ranges in one.items():
            found.setdefault(name, []).extend(ranges)
    return {name: joined_ranges(ranges) for name, ranges in found.items()}
