"""From views to bytes: which bytes of a file a strided view of a tensor covers.

A view is what torch makes of it: sizes, strides and storage offset, in elements. It becomes extents (transfer/plan.py):
runs of bytes that are contiguous in the file and in the destination, in rows where they recur at a fixed stride.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from ..transfer.plan import ExtentRow

Strides = Sequence[int]


def view_extents(
    file: int,
    offset: int,
    itemsize: int,
    sizes: Sequence[int],
    *,
    src_strides: Strides,
    dst_strides: Strides,
    address: int,
) -> list[ExtentRow]:
    """The extents that copy a strided view of a file to strided memory.

    Args:
        file: the file's number in the plan.
        offset: of the view's first element in the file, in bytes.
        itemsize: bytes of an element.
        sizes: of the view.
        src_strides: of the view in the file, in elements; not negative.
        dst_strides: of the destination, in elements; not negative.
        address: of the destination's first element.
    """
    if math.prod(sizes) == 0:
        return []
    dims = _coalesced(sizes, src_strides, dst_strides)
    run = itemsize
    if dims and dims[-1][1] == 1 and dims[-1][2] == 1:
        run *= dims.pop()[0]
    rows, src_row, dst_row = dims.pop() if dims else (1, 0, 0)
    extents = []
    for index in itertools.product(*(range(size) for size, _, _ in dims)):
        src = sum(i * stride for i, (_, stride, _) in zip(index, dims, strict=True)) * itemsize
        dst = sum(i * stride for i, (_, _, stride) in zip(index, dims, strict=True)) * itemsize
        row = (file, rows, offset + src, run, src_row * itemsize, address + dst, dst_row * itemsize)
        extents.append(ExtentRow(*row))
    return extents


def _coalesced(sizes: Sequence[int], src: Strides, dst: Strides) -> list[tuple[int, int, int]]:
    """(size, source stride, destination stride) per dimension, with those joined that are one run in both."""
    dims: list[tuple[int, int, int]] = []
    for size, src_stride, dst_stride in zip(sizes, src, dst, strict=True):
        if size == 1:
            continue
        if dims:
            outer, outer_src, outer_dst = dims[-1]
            if outer_src == size * src_stride and outer_dst == size * dst_stride:
                dims[-1] = (outer * size, src_stride, dst_stride)
                continue
        dims.append((size, src_stride, dst_stride))
    return dims


def contiguous_strides(sizes: Sequence[int]) -> list[int]:
    """Strides, in elements, of a contiguous tensor."""
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(sizes[dim + 1], 1)
    return strides


def joined(ranges: Iterable[tuple[int, int]], gap_bytes: int = 0) -> list[tuple[int, int]]:
    """(offset, length) of ranges in their order, with ``gap_bytes`` or less between two, or an overlap, as one."""
    found: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if found and offset <= sum(found[-1]) + gap_bytes:
            first = found[-1][0]
            found[-1] = first, max(sum(found[-1]), offset + length) - first
        else:
            found.append((offset, length))
    return found
