"""A training checkpoint's tensor by its bytes, as if it lay in one piece.

What is wanted of a tensor is asked for as extents of the whole tensor (transfer/plan.py). Here each becomes the extents
of the chunks that have some of it, so that what a rank keeps is read, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...transfer.plan import ExtentRow
from ..geometry import contiguous_strides
from .boxes import StoredTensor
from .items import dtype_name
from .tensors import DcpTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """What a chunk holds of a tensor that is seen as rows: some of the rows, and of each the same bytes.

    Attributes:
        file: its number among the checkpoint's files.
        offset: of its first byte there.
        first_row, end_row: the rows.
        begin, end: the bytes of each.
    """

    file: int
    offset: int
    first_row: int
    end_row: int
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return (self.end_row - self.first_row) * (self.end - self.begin)

    def holds(self, row: int, begin: int, end: int) -> bool:
        """Whether bytes of a row are all here."""
        return self.first_row <= row < self.end_row and self.begin <= begin and end <= self.end


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor as rows of ``pitch`` bytes, and the pieces that make it up."""

    pitch: int
    pieces: tuple[Piece, ...]

    def extents(self, row: ExtentRow, offset: int) -> Iterator[ExtentRow]:
        """An extent of the whole tensor, ``offset`` bytes from its beginning, as extents of the files."""
        _, rows, _, nbytes, stride, address, dst_stride = row
        first, begin = divmod(offset, self.pitch)
        if rows == 1:
            yield from self._run(first, begin, nbytes, address)
        elif stride % self.pitch == 0 and begin + nbytes <= self.pitch:
            yield from self._rows(first, stride // self.pitch, rows, begin, begin + nbytes, address, dst_stride)
        else:
            piece = self._piece(first, begin, begin + (rows - 1) * stride + nbytes)
            if piece is not None:
                src = piece.offset + (first - piece.first_row) * (piece.end - piece.begin) + begin - piece.begin
                yield ExtentRow(piece.file, rows, src, nbytes, stride, address, dst_stride)
                return
            for number in range(rows):
                at = divmod(offset + number * stride, self.pitch)
                yield from self._run(*at, nbytes, address + number * dst_stride)

    def _run(self, row: int, begin: int, nbytes: int, address: int) -> Iterator[ExtentRow]:
        """Consecutive bytes: the end of a row, whole rows, the beginning of one."""
        if begin:
            width = min(nbytes, self.pitch - begin)
            yield from self._rows(row, 1, 1, begin, begin + width, address, 0)
            row, nbytes, address = row + 1, nbytes - width, address + width
        whole, rest = divmod(nbytes, self.pitch)
        if whole:
            yield from self._rows(row, 1, whole, 0, self.pitch, address, self.pitch)
        if rest:
            yield from self._rows(row + whole, 1, 1, 0, rest, address + whole * self.pitch, 0)

    def _rows(
        self, first: int, step: int, count: int, begin: int, end: int, address: int, dst_stride: int
    ) -> Iterator[ExtentRow]:
        """The same bytes of every ``step``-th row."""
        for piece in self.pieces:
            low = max(0, -(-(piece.first_row - first) // step))
            high = min(count, -(-(piece.end_row - first) // step))
            left, right = max(begin, piece.begin), min(end, piece.end)
            if low >= high or left >= right:
                continue
            pitch, width, rows = piece.end - piece.begin, right - left, high - low
            src = piece.offset + (first + low * step - piece.first_row) * pitch + left - piece.begin
            dst = address + low * dst_stride + left - begin
            if rows == 1 or (step == 1 and width == pitch == dst_stride):
                yield ExtentRow(piece.file, 1, src, rows * width, 0, dst, 0)
            else:
                yield ExtentRow(piece.file, rows, src, width, step * pitch, dst, dst_stride)

    def _piece(self, row: int, begin: int, end: int) -> Piece | None:
        return next((piece for piece in self.pieces if piece.holds(row, begin, end)), None)


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
