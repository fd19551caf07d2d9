"""Reads of one box of a stored tensor, in one piece or in several, into memory of any kind and strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...errors import CheckpointError
from ...transfer.plan import ExtentRow, extent
from ..geometry import contiguous_strides, view_extents
from ..targets import overlaps_itself

_MANY_RUNS = 4096
"""So many runs of a few bytes each are read as what they span, and taken apart by torch."""
_SHORT_RUN_BYTES = 64
_MOST_SPAN_BYTES = 64 << 20
_MOST_SPAN_FACTOR = 16


class Piece(NamedTuple):
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
    """A tensor as if it lay in one piece: rows of ``pitch`` bytes, and the pieces that make it up.

    What is wanted of it is asked for as extents of the whole tensor (transfer/plan.py). Each becomes the extents of the
    pieces that have some of it, so that what a rank keeps is read, and nothing else.
    """

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
                yield extent(piece.file, src, rows * width, dst)
            else:
                yield ExtentRow(piece.file, rows, src, width, step * pitch, dst, dst_stride)

    def _piece(self, row: int, begin: int, end: int) -> Piece | None:
        return next((piece for piece in self.pieces if piece.holds(row, begin, end)), None)


class StoredTensor(NamedTuple):
    """A tensor, or a chunk of one, as it is stored.

    Attributes:
        name: in the checkpoint.
        file: its number in ``DcpFiles``.
        offset: of its first element in the file, in bytes.
        dtype, shape, strides: of what is stored; strides in elements.
        pieces: where it lies in several files, with an offset of 0; else None.
    """

    name: str
    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    pieces: Pieces | None = None


@dataclass(slots=True)
class BoxRead:
    """The read of one box of a stored tensor.

    Attributes:
        extents: what to read.
        owner: what keeps the memory it goes to.
        pending: where the bytes do not go to their target straight away: (what is read, the target).
        nbytes: of the box.
    """

    extents: list[ExtentRow]
    owner: torch.Tensor
    pending: tuple[torch.Tensor, torch.Tensor] | None
    nbytes: int

    def finish(self) -> None:
        """To be called when the extents have been read."""
        if self.pending is not None:
            read, target = self.pending
            with torch.no_grad():
                target.copy_(read)


def box_read(
    stored: StoredTensor,
    offsets: Sequence[int],
    lengths: Sequence[int],
    target: torch.Tensor,
    path_of: Callable[[int], str],
) -> BoxRead:
    """The read of a box of a stored tensor into ``target``, which it fills.

    Args:
        stored: the tensor.
        offsets: of the box in it, in elements per dimension.
        lengths: of the box.
        target: of the shape ``lengths``; of any device and element type.
        path_of: the path of a file by its number, for messages.

    Raises:
        CheckpointError: the box is not within the tensor, or the target has another shape.
    """
    plain = _is_plain(target, stored.dtype)
    if plain and _is_one_run(stored, offsets, lengths, target):
        nbytes = target.nbytes
        first = stored.offset + offsets[0] * stored.strides[0] * stored.dtype.itemsize
        return BoxRead([extent(stored.file, first, nbytes, target.data_ptr())], target, None, nbytes)
    whole = stored.shape
    inside = len(offsets) == len(lengths) == len(whole) and all(
        begin >= 0 and length >= 0 and begin + length <= size
        for begin, length, size in zip(offsets, lengths, whole, strict=True)
    )
    if not inside or tuple(target.shape) != tuple(lengths):
        raise CheckpointError(
            f"{stored.name!r}: the part {list(lengths)} at {list(offsets)} of what is stored as {list(whole)} "
            f"is to go to {list(target.shape)}",
            file=path_of(stored.file),
            hint="metadata and files are of different saves, or a shape differs between model and checkpoint",
        )
    first = stored.offset + _dot(offsets, stored.strides) * stored.dtype.itemsize
    nbytes = math.prod(lengths) * stored.dtype.itemsize
    if not nbytes:
        return BoxRead([], target, None, 0)
    if plain and not _scattered(lengths, stored, target.stride()):
        return BoxRead(_extents(stored, first, lengths, target), target, None, nbytes)
    span = _dot([length - 1 for length in lengths], stored.strides) + 1
    costly = span * stored.dtype.itemsize > max(_MOST_SPAN_BYTES, _MOST_SPAN_FACTOR * nbytes)
    if costly or not _scattered(lengths, stored, contiguous_strides(lengths)):
        read = torch.empty(tuple(lengths), dtype=stored.dtype, device="cpu")
        return BoxRead(_extents(stored, first, lengths, read), read, (read, target), nbytes)
    flat = torch.empty(span, dtype=stored.dtype, device="cpu")
    rows = [extent(stored.file, first, flat.nbytes, flat.data_ptr())]
    return BoxRead(rows, flat, (flat.as_strided(tuple(lengths), stored.strides), target), flat.nbytes)


def _is_plain(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of the file can be put where the target's memory is."""
    if type(target) not in (torch.Tensor, torch.nn.Parameter) or target.layout != torch.strided:
        return False
    if target.dtype != dtype or target.device.type != "cpu" or target.is_conj() or target.is_neg():
        return False
    try:
        return target.data_ptr() != 0 and (target.is_contiguous() or not overlaps_itself(target))
    except RuntimeError:  # fake tensors have no address
        return False


def _is_one_run(stored: StoredTensor, offsets: Sequence[int], lengths: Sequence[int], target: torch.Tensor) -> bool:
    """Whether a part is within its tensor, and as contiguous there as in its plain target: all of it, or whole rows."""
    whole = stored.shape
    return (
        len(whole) == len(offsets) > 0
        and target.shape == lengths
        and lengths[1:] == whole[1:]
        and 0 <= offsets[0] <= whole[0] - lengths[0]
        and not any(offsets[1:])
        and target.stride() == stored.strides
        and target.is_contiguous()
        and target.nbytes > 0
    )


def _scattered(lengths: Sequence[int], stored: StoredTensor, strides: Sequence[int]) -> bool:
    """Whether the copy would be very many runs of very few bytes."""
    run = 1
    for length, src, dst in reversed(list(zip(lengths, stored.strides, strides, strict=True))):
        if length == 1:
            continue
        if src != run or dst != run:
            break
        run *= length
    runs = math.prod(lengths) // run
    return runs > _MANY_RUNS and run * stored.dtype.itemsize < _SHORT_RUN_BYTES


def _extents(stored: StoredTensor, first: int, lengths: Sequence[int], target: torch.Tensor) -> list[ExtentRow]:
    return view_extents(
        stored.file,
        first,
        stored.dtype.itemsize,
        lengths,
        src_strides=stored.strides,
        dst_strides=target.stride(),
        address=target.data_ptr(),
    )


def _dot(offsets: Sequence[int], strides: Sequence[int]) -> int:
    return sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
