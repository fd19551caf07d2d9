"""Parts of a tensor by index, reading only the bytes that the index needs."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch

from ..errors import CheckpointError
from ..formats.safetensors import TensorInfo
from ..report.load_report import LoadReport
from ..transfer.plan import ExtentRow
from .geometry import view_extents
from .store import TensorStore

Index: TypeAlias = Any
"""Whatever torch takes between brackets: integers, slices, None, ``...``, lists and tensors of indices, masks."""
_Item: TypeAlias = int | slice | torch.Tensor | None
_NEAR_BYTES = 64 << 10
"""Reader threads read what is nearer to each other than this in one go, with what lies between."""
_OTHER = object()
"""Stands for an index of a kind that is not taken apart here: then the whole tensor is read, and torch indexes it."""


class TensorSlice:
    """A tensor that is read when it is indexed; made by ``Checkpoint.get_slice``.

    An index means what it means in torch for the whole tensor (of a type smaller than a byte: as torch packs it).
    Integers, slices and ``...`` read their bytes, with what lies between them where that is less than 64 KiB; a list of
    indices, or a mask, reads each of its rows once (of columns: all that they span). What torch takes beyond this
    (True, nested lists, …) reads the whole tensor.
    """

    def __init__(self, info: TensorInfo, store: TensorStore, device: torch.device) -> None:
        self._info = info
        self._store = store
        self._device = device
        dtype, shape = store.dtype_and_shape(info)
        self._whole = torch.empty(shape, dtype=dtype, device="meta")
        self._everything = [slice(None)] * len(shape)

    def get_shape(self) -> list[int]:
        """The tensor's shape, as in the header."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """The tensor's element type, as in the header, e.g. "BF16"."""
        return self._info.dtype

    def __getitem__(self, index: Index) -> torch.Tensor:
        """Read the part, as a new tensor on the checkpoint's device.

        Raises:
            IndexError: the index does not fit the tensor.
            CheckpointError: the bytes could not be read.
        """
        return self._part(index).to(self._device)

    def _part(self, index: Index) -> torch.Tensor:
        if index is Ellipsis:
            return self._fill([(self._everything, 0)], 0, self._whole.shape)
        items = [_item(item) for item in (index if isinstance(index, tuple) else (index,))]
        if any(item is _OTHER for item in items) or sum(item is Ellipsis for item in items) > 1:
            return self._part(...)[index]
        if not any(isinstance(item, torch.Tensor) for item in items):
            _ = self._whole[tuple(items)]  # raises what torch raises
        return self._gather(_per_dimension(items, self._whole.shape))

    def _gather(self, items: list[_Item]) -> torch.Tensor:
        """Read the box that the items span, of one list of indices only its rows, and index what was read."""
        box: list[slice] = []
        inside: list[_Item] = []
        picked: tuple[int, torch.Tensor] | None = None  # dimension and rows of the list that is read row by row
        for item in items:
            if item is None:
                inside.append(None)
                continue
            size = self._whole.shape[len(box)]
            if not isinstance(item, torch.Tensor):
                box.append(item if isinstance(item, slice) else _one(item, len(box), size))
                inside.append(slice(None) if isinstance(item, slice) else 0)
                continue
            wanted = _in_bounds(item, len(box), size)
            values = torch.unique(wanted)
            low, high = (int(values[0]), int(values[-1]) + 1) if len(values) else (0, 0)
            if picked is None and not self._is_narrow(box):
                picked = (len(box), values)
                inside.append(torch.searchsorted(values, wanted))
            else:
                # The range that the list spans: every combination of two lists would be many small reads.
                inside.append(wanted - low)
            box.append(slice(low, high))
        shape = list(self._whole[tuple(box)].shape)
        if picked is None:
            return self._fill([(box, 0)], 0, shape)[tuple(inside)]
        dim, rows = picked
        shape[dim] = len(rows)
        return self._fill([(_with(box, dim, run), row) for row, run in _runs(rows)], dim, shape)[tuple(inside)]

    def _is_narrow(self, box: list[slice]) -> bool:
        """Whether what follows ``box`` recurs so closely that a read of one part of it takes in the others."""
        outer = self._whole[tuple(box)]
        steps = [step for step, size in zip(outer.stride()[: len(box)], outer.shape, strict=False) if size > 1]
        return bool(steps) and min(steps) * outer.dtype.itemsize <= _NEAR_BYTES

    def _fill(self, boxes: list[tuple[list[slice], int]], dim: int, shape: Sequence[int]) -> torch.Tensor:
        """Read boxes of the whole into one new tensor.

        Args:
            boxes: (slices of the whole, position in the new tensor along ``dim``) of each.
            dim: the dimension along which they lie in the new tensor.
            shape: of the new tensor.
        """
        if not self._store.has_extents(self._info):
            ((_, whole),) = self._store.stream([self._info], LoadReport())
            return torch.cat([whole[tuple(box)] for box, _ in boxes], dim) if self._whole.dim() else whole
        target = self._allocate(shape)
        itemsize, strides = target.dtype.itemsize, target.stride()
        step = strides[dim] * itemsize if strides else 0
        extents: list[ExtentRow] = []
        for box, position in boxes:
            view = self._whole[tuple(box)]
            extents += view_extents(
                self._store.file_number(self._info),
                self._info.offset + int(view.storage_offset()) * itemsize,
                itemsize,
                view.shape,
                src_strides=view.stride(),
                dst_strides=strides,
                address=target.data_ptr() + position * step,
            )
        self._store.read(extents, target)
        return target

    def _allocate(self, shape: Sequence[int]) -> torch.Tensor:
        try:
            return torch.empty(tuple(shape), dtype=self._whole.dtype, device="cpu")
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            raise CheckpointError(f"no memory for {self._info.name!r}: {text}", file=self._info.file) from None


def _item(item: Any) -> Any:
    """A part of an index: an int, a slice, None, ``...``, a CPU tensor of indices or flags, or _OTHER for all else."""
    if item is None or item is Ellipsis or isinstance(item, slice):
        return item
    if isinstance(item, bool | np.bool_):
        return _OTHER
    try:
        if isinstance(item, list | tuple | range):
            return torch.tensor(item, dtype=_dtype_of(item), device="cpu") if _all_integral(item) else _OTHER
        if not isinstance(item, torch.Tensor | np.ndarray):
            return operator.index(item)
        tensor = torch.as_tensor(item, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return _OTHER
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.long() if tensor.dim() else int(tensor)
    return tensor if tensor.dtype == torch.bool and tensor.dim() else _OTHER


def _all_integral(items: Sequence[Any]) -> bool:
    return isinstance(items, range) or all(isinstance(item, Integral) for item in items)


def _dtype_of(items: Sequence[Any]) -> torch.dtype:
    flags = len(items) > 0 and all(isinstance(item, bool) for item in items)
    return torch.bool if flags else torch.int64


def _per_dimension(items: list[Any], shape: Sequence[int]) -> list[_Item]:
    """One item per dimension, and None for every new one: ``...`` written out, masks made indices."""
    missing = len(shape) - sum(map(_dims, items))
    if missing < 0:
        raise IndexError(f"too many indices for tensor of dimension {len(shape)}")
    dots = next((number for number, item in enumerate(items) if item is Ellipsis), len(items))
    dense: list[_Item] = []
    dim = 0
    for item in [*items[:dots], *[slice(None)] * missing, *items[dots + 1 :]]:
        if isinstance(item, torch.Tensor) and item.dtype == torch.bool:
            if item.shape != torch.Size(shape[dim : dim + item.dim()]):
                raise IndexError(f"the mask of shape {list(item.shape)} does not fit {list(shape)} at dimension {dim}")
            dense += item.nonzero(as_tuple=True)
        else:
            dense.append(item)
        dim += _dims(item)
    return dense


def _dims(item: Any) -> int:
    """How many dimensions an item takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, torch.Tensor) and item.dtype == torch.bool else 1


def _in_bounds(index: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    bad = index[(index < -size) | (index >= size)]
    if bad.numel():
        raise IndexError(f"index {int(bad.flatten()[0])} is out of bounds for dimension {dim} with size {size}")
    return torch.where(index < 0, index + size, index)


def _one(index: int, dim: int, size: int) -> slice:
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for dimension {dim} with size {size}")
    row = index % size
    return slice(row, row + 1)


def _runs(rows: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(position, run) of each run of consecutive numbers in the sorted ``rows``."""
    cuts = ((rows.diff() != 1).nonzero().flatten() + 1).tolist()
    for begin, end in itertools.pairwise([0, *cuts, len(rows)]):
        first = int(rows[begin]) if end > begin else 0
        yield begin, slice(first, first + end - begin)


def _with(box: list[slice], dim: int, item: slice) -> list[slice]:
    return [*box[:dim], item, *box[dim + 1 :]]
