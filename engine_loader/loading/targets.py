"""Checks of memory that tensors are read straight into: does the tensor fit, and does no other lie there?"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from ..errors import CheckpointError
from ..formats.safetensors import TensorInfo

_OVERLAP_WORK = 100_000
"""Steps that a search for common bytes of two strided targets may take."""


def check_target(info: TensorInfo, dtype: torch.dtype, shape: tuple[int, ...], target: torch.Tensor) -> None:
    """Refuse a target that is not the checkpoint's tensor in element type and shape, or cannot be written byte by byte.

    Args:
        info: the tensor.
        dtype, shape: what it is as a torch tensor.
        target: to be filled.

    Raises:
        CheckpointError: it does not fit; the message says why.
    """
    if target.dtype != dtype or target.shape != shape:
        raise CheckpointError(
            f"{info.name!r} is {dtype} {list(shape)}, the target is {target.dtype} {list(target.shape)}", file=info.file
        )
    if not _has_memory(target):
        raise CheckpointError(f"the target of {info.name!r} has no memory to read into", file=info.file)
    if not target.is_contiguous() and overlaps_itself(target):
        raise CheckpointError(
            f"elements of the target of {info.name!r} share memory: strides {target.stride()}", file=info.file
        )


def _has_memory(target: torch.Tensor) -> bool:
    """Whether bytes can be put where the tensor says that its memory is."""
    if target.layout != torch.strided or target.device.type == "meta" or target.is_conj() or target.is_neg():
        return False
    try:
        return target.data_ptr() != 0 or target.numel() == 0
    except RuntimeError:  # a wrapper that torch knows to have none
        return False


def overlaps_itself(target: torch.Tensor) -> bool:
    """Whether two elements may share memory, as ``expand`` and ``as_strided`` can make them."""
    reach = 1
    for stride, size in sorted(zip(target.stride(), target.shape, strict=True)):
        if size > 1 and stride < reach:
            return target.numel() > 0
        reach += (size - 1) * stride
    return False


def check_targets_apart(pairs: Iterable[tuple[TensorInfo, torch.Tensor]]) -> None:
    """Refuse targets in CPU memory that share bytes: which one would come last is not defined.

    Raises:
        CheckpointError: two of them do.
    """
    pairs = [pair for pair in pairs if pair[0].nbytes]
    if _spans_are_apart([target for _, target in pairs]):
        return
    before: list[tuple[int, TensorInfo, torch.Tensor]] = []
    for info, target in sorted(pairs, key=lambda pair: pair[1].data_ptr()):
        begin = target.data_ptr()
        before = [item for item in before if item[0] > begin]
        for _, other_info, other in before:
            if _share_memory(other, target):
                raise CheckpointError(
                    f"the targets of {other_info.name!r} and {info.name!r} overlap in memory", file=info.file
                )
        if target.numel():
            before.append((begin + _span_bytes(target), info, target))


def _spans_are_apart(targets: list[torch.Tensor]) -> bool:
    """Whether not even the spans of the targets overlap: the common case, settled at once for very many of them."""
    begins = np.array([target.data_ptr() for target in targets], np.uint64)
    spans = [target.nbytes if target.is_contiguous() else _span_bytes(target) for target in targets]
    order = np.argsort(begins)
    ends = begins[order] + np.array(spans, np.uint64)[order]
    return bool(np.all(ends[:-1] <= begins[order][1:]))


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors whose spans overlap have bytes in common."""
    if not other.numel():
        return False
    if one.is_contiguous() and other.is_contiguous():
        return True
    try:
        return np.shares_memory(_elements(one), _elements(other), max_work=_OVERLAP_WORK)
    except (np.exceptions.TooHardError, ValueError):  # too many dimensions, in no simple pattern: the caller must know
        return False


def _elements(target: torch.Tensor) -> npt.NDArray[np.void]:
    """The memory of a tensor, as numpy sees it."""
    itemsize = target.dtype.itemsize
    memory = (ctypes.c_char * _span_bytes(target)).from_address(target.data_ptr())
    strides = [stride * itemsize for stride in target.stride()]
    return np.ndarray(tuple(target.shape), np.dtype(f"V{itemsize}"), memoryview(memory).cast("B"), 0, strides)


def _span_bytes(target: torch.Tensor) -> int:
    steps = sum((size - 1) * stride for size, stride in zip(target.shape, target.stride(), strict=True))
    return int(steps + 1) * target.dtype.itemsize
