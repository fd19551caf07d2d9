"""The reads of a plan: large extents cut, neighbours merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...sources.source import SourceFile
from ..plan import Extents

MAX_SCATTER = 512
"""Destinations of one read; the kernel takes at most 1024."""


@dataclass(slots=True, eq=False)
class Read:
    """One task of a thread: consecutive bytes of a file into one or several destinations.

    ``since`` is when it began or last got bytes.
    """

    file: SourceFile
    offset: int
    extents: list[int]
    addresses: list[int]
    lengths: list[int]
    since: float = 0.0


@dataclass(slots=True, eq=False)
class RowsRead:
    """One task of a thread: a span of a file of which rows are kept."""

    file: SourceFile
    offset: int
    extent: int
    rows: int
    row_bytes: int
    src_stride: int
    address: int
    dst_stride: int
    since: float = 0.0


def cut_tasks(
    files: Sequence[SourceFile], extents: Extents, order: list[int], block_bytes: int, gap_bytes: int
) -> Iterator[Read | RowsRead]:
    """Cut large extents and merge neighbours, in the given order."""
    pending: Read | None = None
    for index in order:
        number, rows, offset, row_bytes, src_stride, address, dst_stride = extents[index].item()
        file = files[number]
        if rows * row_bytes == 0:
            continue
        if rows > 1 and not (src_stride == dst_stride == row_bytes):
            if pending is not None:
                yield pending
                pending = None
            whole = RowsRead(file, offset, index, rows, row_bytes, src_stride, address, dst_stride)
            yield from _row_tasks(whole, block_bytes, gap_bytes)
            continue
        for start in range(0, rows * row_bytes, block_bytes):
            length = min(block_bytes, rows * row_bytes - start)
            if pending is not None and _joins(pending, file, offset + start, length, block_bytes):
                pending.extents.append(index)
                pending.addresses.append(address + start)
                pending.lengths.append(length)
                continue
            if pending is not None:
                yield pending
            pending = Read(file, offset + start, [index], [address + start], [length])
    if pending is not None:
        yield pending


def _joins(pending: Read, file: SourceFile, offset: int, length: int, block_bytes: int) -> bool:
    held = sum(pending.lengths)
    return (
        pending.file is file
        and pending.offset + held == offset
        and held + length <= block_bytes
        and len(pending.lengths) < MAX_SCATTER
    )


def _row_tasks(read: RowsRead, block_bytes: int, gap_bytes: int) -> Iterator[Read | RowsRead]:
    # The stride is smaller than a row where rows overlap, and zero where one row is wanted many times.
    pitch = max(read.src_stride, read.row_bytes)
    dense = pitch - read.row_bytes <= gap_bytes and pitch <= block_bytes
    step = block_bytes // pitch if dense else 1
    for row in range(0, read.rows, step):
        rows = min(step, read.rows - row)
        offset, address = read.offset + row * read.src_stride, read.address + row * read.dst_stride
        if rows > 1:
            yield dataclasses.replace(read, offset=offset, rows=rows, address=address)
            continue
        for start in range(0, read.row_bytes, block_bytes):
            length = min(block_bytes, read.row_bytes - start)
            yield Read(read.file, offset + start, [read.extent], [address + start], [length])
