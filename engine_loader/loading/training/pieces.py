"""The pieces of a training checkpoint's tensor: what its chunks hold, seen as rows of one piece."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..geometry import contiguous_strides
from .boxes import Piece, Pieces, StoredTensor
from .items import dtype_name
from .tensors import DcpTensor


def pieces_of(tensor: DcpTensor, stored: Sequence[StoredTensor | None]) -> Pieces | None:
    """A tensor's pieces, from its located chunks.

    None where elements are not plain bytes in their order, or chunks were cut in more than two dimensions.
    """
    dtype = dtype_name(tensor.dtype)
    if dtype is None or dtype == "F4":
        return None
    shape = tensor.shape
    cut = [dim for chunk in tensor.chunks for dim, size in enumerate(chunk.sizes) if size != shape[dim]]
    split = max([1, *cut])
    unit = math.prod(shape[split:]) * tensor.dtype.itemsize
    pieces = []
    for chunk, part in zip(tensor.chunks, stored, strict=True):
        if not math.prod(chunk.sizes):
            continue
        rows = _run(shape[:split], chunk.offsets[:split], chunk.sizes[:split])
        columns = _run(shape[split:], chunk.offsets[split:], chunk.sizes[split:])
        if rows is None or columns is None or part is None or not _is_in_order(part, tensor, chunk.sizes):
            return None
        item = tensor.dtype.itemsize
        pieces.append(Piece(part.file, part.offset, *rows, columns[0] * item, columns[1] * item))
    return Pieces(unit, tuple(pieces))


def _run(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, int] | None:
    """(first, end) of a box's elements, where they follow each other in the whole."""
    several = next((dim for dim, size in enumerate(sizes) if size != 1), len(sizes))
    if tuple(sizes[several + 1 :]) != tuple(shape[several + 1 :]):
        return None
    strides = contiguous_strides(shape)
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    return first, first + math.prod(sizes)


def _is_in_order(stored: StoredTensor, tensor: DcpTensor, sizes: Sequence[int]) -> bool:
    """Whether a chunk is stored as the metadata says, its elements in their order."""
    in_order = all(
        stride == expected
        for size, stride, expected in zip(stored.shape, stored.strides, contiguous_strides(stored.shape), strict=True)
        if size != 1
    )
    return stored.dtype == tensor.dtype and stored.shape == tuple(sizes) and in_order
