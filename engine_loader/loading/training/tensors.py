"""The tensors of a training checkpoint by its metadata: their names, shapes and chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ...errors import CheckpointError
from ...formats.dtypes import header_shape
from ...formats.safetensors import TensorInfo
from ..find import natural_key
from .beside import Beside, LeftOut, beside_the_model, is_averaged
from .items import dtype_name
from .key_mapping import Renamer

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

_MANY_CHUNKS = 4096
"""Whether more than these overlap is not looked at: that they have the right size together must do."""


@dataclass(frozen=True, slots=True)
class DcpChunk:
    """A part of a tensor: the item that ``stored`` points to, and the box of the whole that it is, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: _StorageInfo


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A tensor of the checkpoint: ``stored_name`` is what the training called it."""

    name: str
    stored_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[DcpChunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def info(self, file: str, offset: int) -> TensorInfo:
        # What safetensors has no name for goes by torch's.
        dtype = dtype_name(self.dtype)
        if dtype is None:
            return TensorInfo(self.name, str(self.dtype).removeprefix("torch."), self.shape, file, offset, self.nbytes)
        return TensorInfo(self.name, dtype, header_shape(dtype, self.shape), file, offset, self.nbytes)


def tensors_of(
    metadata: Metadata, file: str, rename: Renamer, left_out: LeftOut, *, optimizer_state: bool
) -> dict[str, DcpTensor]:
    """The tensors by their new names, in the order of their files.

    Args:
        metadata: the checkpoint's.
        file: its path, for messages.
        rename: from the training's names to those that are wanted.
        left_out: counts the tensors that are left out.
        optimizer_state: also take the tensors that are not the model's.

    Raises:
        CheckpointError: two tensors get the same name, or chunks are missing or overlap.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored_at: dict[tuple[str, tuple[int, ...] | None], _StorageInfo] = {
        (index.fqn, None if index.offset is None else tuple(index.offset)): stored
        for index, stored in (metadata.storage_data or {}).items()
    }
    entries = metadata.state_dict_metadata
    beside = {} if optimizer_state else beside_the_model(entries, state_paths(metadata))
    found = []
    for name, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        kind = beside.get(name)
        renamed = rename(name) if kind in (None, Beside.EMA) else None
        # Names that are given to an averaged copy ask for it.
        if renamed is None or (kind == Beside.EMA and is_averaged(renamed)):
            left_out.count(kind or "by key_mapping", math.prod(entry.size) * entry.properties.dtype.itemsize)
        else:
            found.append(_tensor(name, renamed, entry, stored_at, file))
    tensors: dict[str, DcpTensor] = {}
    for tensor in sorted(found, key=_file_order):
        if tensor.name in tensors:
            raise CheckpointError(
                f"{tensors[tensor.name].stored_name!r} and {tensor.stored_name!r} both become {tensor.name!r}",
                file=file,
                hint="correct key_mapping",
            )
        tensors[tensor.name] = tensor
    return tensors


def state_paths(metadata: Metadata) -> Mapping[str, Any]:
    """The keys under which each item was in the nested state dict, by its name there."""
    return metadata.planner_data if isinstance(metadata.planner_data, dict) else {}


def _tensor(
    stored_name: str,
    name: str,
    entry: TensorStorageMetadata,
    stored_at: Mapping[tuple[str, tuple[int, ...] | None], _StorageInfo],
    file: str,
) -> DcpTensor:
    chunks = []
    for chunk in entry.chunks:
        offsets = tuple(chunk.offsets)
        stored = stored_at.get((stored_name, offsets)) or stored_at.get((stored_name, None))
        if stored is None:
            raise CheckpointError(f"the metadata does not say where {stored_name!r} at {list(offsets)} lies", file=file)
        chunks.append(DcpChunk(offsets, tuple(chunk.sizes), stored))
    check_cover(stored_name, tuple(entry.size), chunks, file)
    return DcpTensor(name, stored_name, entry.properties.dtype, tuple(entry.size), tuple(chunks))


def check_cover(name: str, shape: Sequence[int], chunks: Sequence[DcpChunk | ChunkStorageMetadata], file: str) -> None:
    """Refuse chunks that leave a hole, which would show what was in memory before.

    Raises:
        CheckpointError: they are not the whole tensor, each part of it once.
    """
    if len(chunks) > 1 and _follow_each_other(shape, chunks):
        return
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    apart = len(chunks) == 1 or len(chunks) > _MANY_CHUNKS or _are_apart(chunks)
    if covered != math.prod(shape) or not apart:
        raise CheckpointError(
            f"the chunks of {name!r} are not the whole tensor {list(shape)}, each part once",
            file=file,
            hint="a rank's part is missing: was the checkpoint saved by all of them?",
        )


def _follow_each_other(shape: Sequence[int], chunks: Sequence[DcpChunk | ChunkStorageMetadata]) -> bool:
    """Whether chunks are the whole, cut along one dimension only: this takes no work for each pair of them."""
    cut = {dim for chunk in chunks for dim, size in enumerate(chunk.sizes) if size != shape[dim]}
    if len(cut) != 1:
        return False
    (dim,) = cut
    spans = sorted((chunk.offsets[dim], chunk.offsets[dim] + chunk.sizes[dim]) for chunk in chunks)
    joined = all(end == begin for (_, end), (begin, _) in pairwise(spans))
    return joined and spans[0][0] == 0 and spans[-1][1] == shape[dim]


def _are_apart(chunks: Sequence[DcpChunk | ChunkStorageMetadata]) -> bool:
    """Whether no two chunks have an element in common."""
    low = torch.tensor([chunk.offsets for chunk in chunks], dtype=torch.int64)
    high = low + torch.tensor([chunk.sizes for chunk in chunks], dtype=torch.int64)
    apart = torch.zeros(len(chunks), len(chunks), dtype=torch.bool)
    for dim in range(low.shape[1]):
        begin = torch.maximum(low[:, None, dim], low[None, :, dim])
        apart |= begin >= torch.minimum(high[:, None, dim], high[None, :, dim])
    return int((~apart).sum()) <= int((~apart).diagonal().sum())


def _file_order(tensor: DcpTensor) -> tuple[Any, ...]:
    if not tensor.chunks:
        return ([], 0)
    stored = tensor.chunks[0].stored
    return (natural_key(stored.relative_path), stored.offset)
