"""What a conversion writes: tensors under their new names and types, read ahead in the order in which they go out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import CheckpointError, SettingsError
from ..formats.dtypes import DTYPE_BITS, torch_dtype
from ..formats.safetensors import TensorInfo
from ..loading.training.items import dtype_name
from ..loading.training.key_mapping import Renamer
from ..loading.training.torch_load import check_not_quantised

_FLOATS = ("F64", "F32", "F16", "BF16")
"""What a conversion to another type takes; scales and packed integers of quantised checkpoints stay as they are."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor to be written.

    Attributes:
        name: its new name.
        info: what it is in the source.
        dtype: its element type in the destination, by safetensors' name.
        nbytes: what it takes there.
    """

    name: str
    info: TensorInfo
    dtype: str
    nbytes: int

    @property
    def cast(self) -> torch.dtype | None:
        """The type to convert it to."""
        return None if self.dtype == self.info.dtype else torch_dtype(self.dtype)


class Tensors(Protocol):
    """What is converted: an open ``Checkpoint``, or something that answers as one."""

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Element type, shape and file of a tensor."""
        ...

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of these."""
        ...


def outgoing(checkpoint: Tensors, rename: Renamer, dtype: torch.dtype | None) -> list[Outgoing]:
    """All tensors of a checkpoint, in file order.

    Args:
        checkpoint: the source.
        rename: gives the new names.
        dtype: of floating point tensors; None: their own.

    Raises:
        CheckpointError: two tensors get the same name, or one is quantised by torch.
    """
    found: dict[str, Outgoing] = {}
    for old in checkpoint:
        name, info = rename(old), checkpoint.info(old)
        if name is None:
            continue
        # By torch's name, where safetensors has none.
        if isinstance(stored := getattr(torch, info.dtype, None), torch.dtype):
            check_not_quantised(stored, old, info.file, info.offset)
        if name in found:
            raise CheckpointError(
                f"{found[name].info.name!r} and {old!r} both become {name!r}",
                file=info.file,
                hint="correct key_mapping",
            )
        wanted = None if dtype is None or info.dtype not in _FLOATS else dtype_name(dtype)
        if wanted is None:
            found[name] = Outgoing(name, info, info.dtype, info.nbytes)
        else:
            assert dtype is not None
            nbytes = info.nbytes * 8 // DTYPE_BITS[info.dtype] * dtype.itemsize
            found[name] = Outgoing(name, info, wanted, nbytes)
    return list(found.values())


def floating_point_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type that ``dtype`` is, or names ("bfloat16", "torch.bfloat16").

    Raises:
        SettingsError: it is not a floating-point type of torch.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SettingsError(f"dtype: {dtype!r} is not a floating-point type of torch, such as 'bfloat16'")
    return found


def in_writing_order(tensors: Iterable[Outgoing]) -> list[Outgoing]:
    """Wide elements first, so that each tensor lies at a multiple of its element's size; else the order is kept."""
    return sorted(tensors, key=_width)


def read_in_order(checkpoint: Tensors, tensors: Sequence[Outgoing]) -> Iterator[tuple[Outgoing, torch.Tensor]]:
    """Yield tensors, which are in writing order, while the next ones are read."""
    for _, group in itertools.groupby(tensors, _width):
        by_name: Mapping[str, Outgoing] = {tensor.info.name: tensor for tensor in group}
        for name, tensor in checkpoint.tensors(by_name):
            going = by_name[name]
            yield going, tensor if going.cast is None else tensor.to(going.cast)


def _width(tensor: Outgoing) -> int:
    return -DTYPE_BITS.get(tensor.dtype, 0)
