"""Recorded copies as bytes: which extents a copy is made of, and which copies overlap."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ...transfer.plan import ExtentRow, extent
from ..geometry import view_extents
from ..targets import overlaps_itself
from .torch_private import address_of

# A copy that scatters into smaller runs than this (a transposed one, say), or into more extents, is left to torch.
_MIN_RUN_BYTES = 64
_MAX_EXTENTS = 4096


def has_own_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's data is strided memory of its own, not kept elsewhere by a subclass of Tensor."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and tensor.layout == torch.strided


def takes_bytes(target: torch.Tensor) -> bool:
    """Whether a copy into the tensor is a copy of bytes, each to an address of its own."""
    if not has_own_memory(target) or target.is_conj() or target.is_neg():
        return False
    return target.is_contiguous() or not overlaps_itself(target)


def copy_extents(file: int, offset: int, view: torch.Tensor, target: torch.Tensor) -> list[ExtentRow] | None:
    """The extents that copy a view of a tensor in a file to memory, or None where they would be many tiny runs.

    Args:
        file: the file's number in the plan.
        offset: of the whole tensor in the file, in bytes.
        view: the geometry of the view within the tensor (a meta tensor).
        target: of the view's shape and dtype.
    """
    itemsize = view.dtype.itemsize
    offset += int(view.storage_offset()) * itemsize
    if view.is_contiguous() and target.is_contiguous():
        nbytes = view.numel() * itemsize
        return [extent(file, offset, nbytes, address_of(target))] if nbytes else []
    sizes, strides = tuple(target.shape), view.stride()
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        return None
    if math.prod(sizes[:-2]) > _MAX_EXTENTS:
        return None
    extents = view_extents(
        file, offset, itemsize, sizes, src_strides=strides, dst_strides=target.stride(), address=address_of(target)
    )
    if extents and extents[0][1] > 1 and extents[0][3] < _MIN_RUN_BYTES:
        return None
    return extents


def bytes_of(extents: Iterable[ExtentRow]) -> int:
    """How many bytes the extents copy."""
    nbytes = 0
    for row in extents:
        nbytes += row[1] * row[3]
    return nbytes


@dataclass(slots=True)
class WrittenMemory:
    """Recorded copies into one storage.

    Attributes:
        last_batch: number of the last batch that writes there.
        exposed: the memory was exposed past the dispatcher (``numpy()``, ``data_ptr()``): copies into it are
            synchronous.
    """

    last_batch: int = 0
    exposed: bool = False
    _begins: list[int] = field(default_factory=list)
    _spans: list[tuple[int, int, int, int]] = field(default_factory=list)  # begin, end, stride of rows, bytes of a row
    _longest: int = 0

    def add(self, extents: Iterable[ExtentRow]) -> None:
        """Note that a copy writes these extents."""
        for _, rows, _, row_bytes, _, address, dst_stride in extents:
            end = address + (rows - 1) * dst_stride + row_bytes
            at = bisect.bisect(self._begins, address)
            self._begins.insert(at, address)
            self._spans.insert(at, (address, end, dst_stride if rows > 1 else 0, row_bytes))
            self._longest = max(self._longest, end - address)

    def overlaps(self, extents: Iterable[ExtentRow]) -> bool:
        """Whether the extents may write where a copy that was added writes too."""
        begins, spans = self._begins, self._spans
        for _, rows, _, row_bytes, _, address, dst_stride in extents:
            end = address + (rows - 1) * dst_stride + row_bytes
            at = bisect.bisect_left(begins, end) - 1
            while at >= 0 and begins[at] > address - self._longest:
                if spans[at][1] > address and not _in_other_columns(spans[at], address, rows, row_bytes, dst_stride):
                    return True
                at -= 1
        return False


def _in_other_columns(span: tuple[int, int, int, int], address: int, rows: int, row_bytes: int, stride: int) -> bool:
    """Whether rows have the stride of the span's, and lie in columns that the span leaves free."""
    begin, _, other_stride, other_bytes = span
    if rows == 1 or stride != other_stride:
        return False
    shift = (address - begin) % stride
    return shift >= other_bytes and shift + row_bytes <= stride
