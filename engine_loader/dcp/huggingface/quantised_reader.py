"""Reads Hugging Face checkpoints that are quantised in blocks: ``dcp.load`` gets the products with the scales."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ...errors import CheckpointError
from ..reader import told_at_set_up
from ..s3_config import S3ClientConfig
from .hf_reader import HuggingFaceStorageReader

_BATCH_BYTES = 256 << 20
"""As many stored bytes are in memory at once, beside the state dict."""
_ENDS = ((".weight", ".weight_scale_inv"), ("_blocks", "_scales"))
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 4-bit numbers by their bits (OCP Microscaling Formats 1.0)."""
_E8M0_BIAS = 127


@dataclass(frozen=True, slots=True)
class _Quantised:
    """A tensor that is stored in blocks, and the name, the shape and the type of what has their scales."""

    stored: torch.Size
    dtype: torch.dtype
    scales: str
    scale_shape: torch.Size
    scale_dtype: torch.dtype

    @property
    def packed(self) -> bool:
        """Whether two 4-bit numbers are in a byte."""
        return self.dtype == torch.uint8


@dataclass(frozen=True, slots=True)
class _Box:
    """The part of a stored tensor that is read, and the part of its scales, with what is left out at its beginning.

    Attributes:
        weight, scale: (offsets, lengths) of each, in stored elements.
        skip: how many numbers of the first block are not wanted, per dimension; in packed tensors of the last one.
    """

    weight: tuple[tuple[int, ...], tuple[int, ...]]
    scale: tuple[tuple[int, ...], tuple[int, ...]]
    skip: tuple[int, ...]


class QuantizedHuggingFaceStorageReader(HuggingFaceStorageReader):
    """Replaces torch's class of this name (``torch.distributed.checkpoint.quantized_hf_storage``) in ``dcp.load``.

    Weights in blocks (``*.weight`` of 8-bit floats with ``*.weight_scale_inv``, in two dimensions; ``*_blocks`` and
    ``*_scales`` of MXFP4) are multiplied by their scales; all others are read as by HuggingFaceStorageReader. A state
    dict has ``*_blocks`` in the shape of the numbers: the last two dimensions are one. Only the blocks that the plan
    needs are read, and 256 MiB of them are in memory at once, or one tensor.

    Args:
        path: the directory or the URL.
        thread_count: at least so many threads read.
        target_dtype: to which products are rounded, before they go into a state dict of any element type.
        block_size: rows and columns of a block.
        region: of the bucket; "": the region of the environment.
        s3client_config: options of the client; None: the loader's settings.
        options: settings of the loader by name.

    Raises (when it loads; ``dcp.load`` may wrap it in its CheckpointException):
        CheckpointError: as HuggingFaceStorageReader, or scales do not fit the weights in shape.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thread_count: int = 1,
        target_dtype: torch.dtype = torch.float32,
        block_size: int = 128,
        *,
        region: str = "",
        s3client_config: S3ClientConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, thread_count, region=region, s3client_config=s3client_config, **options)
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        self.target_dtype = target_dtype
        self.block_size = block_size
        self._quantised: dict[str, _Quantised] = {}

    @told_at_set_up
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata, with the shapes and the type of the products.

        Raises:
            CheckpointError: a header is wrong, or scales do not fit their weights.
        """
        metadata = super().read_metadata(*args, **kwargs)
        entries = metadata.state_dict_metadata
        self._quantised = {}
        for name, entry in list(entries.items()):
            scales = next((name[: -len(end)] + other for end, other in _ENDS if name.endswith(end)), None)
            factors = entries.get(scales) if scales is not None else None
            if not isinstance(entry, TensorStorageMetadata) or not isinstance(factors, TensorStorageMetadata):
                continue
            assert scales is not None
            types = entry.properties.dtype, factors.properties.dtype
            found = _Quantised(entry.size, types[0], scales, factors.size, types[1])
            if not self._is_in_blocks(name, found):
                continue
            self._quantised[name] = found
            size = entry.size
            if found.packed:
                size = torch.Size((*size[:-2], size[-2] * size[-1] * 2))
            whole = [ChunkStorageMetadata(torch.Size([0] * len(size)), size)]
            entries[name] = TensorStorageMetadata(TensorProperties(self.target_dtype), size, whole)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Carry out a plan.

        Raises:
            CheckpointError: a tensor cannot be read; the state dict then holds unspecified values.
        """
        plain = [item for item in plan.items if item.storage_index.fqn not in self._quantised]
        done = super().read_data(LoadPlan(plain), planner)
        for batch in self._batches([item for item in plan.items if item.storage_index.fqn in self._quantised]):
            raw = _RawTensors()
            read = [
                (item, box, raw.wanted(name, box.weight, found.stored, found.dtype),
                 raw.wanted(found.scales, box.scale, found.scale_shape, found.scale_dtype))
                for item, box, name, found in batch
            ]  # fmt: skip
            super().read_data(LoadPlan(raw.items), cast(LoadPlanner, raw))
            for item, box, weight, scale in read:
                target = planner.resolve_tensor(item).detach()
                if target.shape != item.lengths:
                    raise CheckpointError(
                        f"{item.storage_index.fqn!r}: {list(item.lengths)} of the checkpoint does not fit the target's "
                        f"{list(target.shape)}",
                        file=os.fspath(self.path),
                    )
                if weight.dtype == torch.uint8:
                    self._unpack(weight, scale, box.skip, target)
                else:
                    self._multiply(weight, scale, box.skip, target)
                planner.commit_tensor(item, target)
        return done

    def _is_in_blocks(self, name: str, found: _Quantised) -> bool:
        """Whether a tensor is multiplied by its scales.

        Raises:
            CheckpointError: it should be, but the scales are those of other blocks.
        """
        if found.packed:
            expected = found.stored[:-1]
            applies = name.endswith("_blocks") and len(found.stored) > 1
        else:
            expected = torch.Size(-(-size // self.block_size) for size in found.stored)
            floats = found.dtype.itemsize == 1 and found.dtype.is_floating_point
            applies = name.endswith(".weight") and floats
        if applies and (found.scale_shape != expected or (not found.packed and len(expected) != 2)):
            blocks = "its groups" if found.packed else f"blocks of {self.block_size} in two dimensions"
            raise CheckpointError(
                f"{name!r} is {list(found.stored)} and its scales {found.scales!r} are {list(found.scale_shape)}, "
                f"which are not those of {blocks}",
                file=os.fspath(self.path),
                hint="give the reader the block_size of the checkpoint's config.json (weight_block_size)",
            )
        return applies

    def _batches(self, items: Sequence[ReadItem]) -> Iterator[list[tuple[ReadItem, _Box, str, _Quantised]]]:
        batch: list[tuple[ReadItem, _Box, str, _Quantised]] = []
        nbytes = 0
        for item in items:
            name = item.storage_index.fqn
            found = self._quantised[name]
            box = _packed_box(item, found) if found.packed else self._box(item)
            size = math.prod(box.weight[1])
            if batch and nbytes + size > _BATCH_BYTES:
                yield batch
                batch, nbytes = [], 0
            batch.append((item, box, name, found))
            nbytes += size
        if batch:
            yield batch

    def _box(self, item: ReadItem) -> _Box:
        offsets, lengths, size = tuple(item.storage_offsets), tuple(item.lengths), self.block_size
        first = tuple(offset // size for offset in offsets)
        last = (-(-(offset + length) // size) for offset, length in zip(offsets, lengths, strict=True))
        counts = tuple(max(0, end - begin) for begin, end in zip(first, last, strict=True))
        return _Box((offsets, lengths), (first, counts), tuple(offset % size for offset in offsets))

    def _multiply(self, weight: torch.Tensor, scale: torch.Tensor, skip: Sequence[int], target: torch.Tensor) -> None:
        """Put the product into ``target``, block row by block row."""
        size, columns = self.block_size, weight.shape[1]
        factors = scale.float().repeat_interleave(size, dim=1)[:, skip[1] : skip[1] + columns]
        begin, end = 0, size - skip[0]
        for row in factors:
            target[begin:end].copy_((weight[begin:end].float() * row).to(self.target_dtype))
            begin, end = end, end + size

    def _unpack(self, weight: torch.Tensor, scale: torch.Tensor, skip: Sequence[int], target: torch.Tensor) -> None:
        """Put the numbers of packed groups, times their powers of two, into ``target``, by its first dimension."""
        table = torch.tensor(_E2M1, dtype=self.target_dtype)
        exponents = scale.to(torch.int32) - _E8M0_BIAS
        # One of the first dimension at a time: of experts' matrices, these are the experts.
        for number in range(len(weight)) if weight.dim() > 2 else (slice(None),):
            part = weight[number]
            numbers = torch.stack([table[(part & 15).long()], table[(part >> 4).long()]], dim=-1).flatten(-2)
            values = torch.ldexp(numbers, exponents[number][..., None]).flatten(-2)
            into = target[number]
            into.copy_(values[..., skip[-1] : skip[-1] + into.shape[-1]])


class _RawTensors:
    """The part of a planner that a reader needs: tensors of their own for what is stored."""

    def __init__(self) -> None:
        self.items: list[ReadItem] = []
        self._tensors: list[torch.Tensor] = []

    def wanted(
        self, name: str, box: tuple[tuple[int, ...], tuple[int, ...]], shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        """The memory into which a part of a stored tensor of ``shape`` will be read."""
        offsets, lengths = map(torch.Size, box)
        tensor = torch.empty(lengths, dtype=dtype)
        index = MetadataIndex(name, torch.Size([0] * len(shape)))
        number = MetadataIndex(str(len(self._tensors)))
        self.items.append(ReadItem(LoadItemType.TENSOR, number, torch.Size([0] * len(shape)), index, offsets, lengths))
        self._tensors.append(tensor)
        return tensor

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        """The tensor of an item."""
        return self._tensors[int(item.dest_index.fqn)]

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do."""


def _packed_box(item: ReadItem, found: _Quantised) -> _Box:
    offsets, lengths = tuple(item.storage_offsets), tuple(item.lengths)
    numbers = found.stored[-1] * 2
    first, end = offsets[-1] // numbers, -(-(offsets[-1] + lengths[-1]) // numbers)
    begin, counts = (*offsets[:-1], first), (*lengths[:-1], max(0, end - first))
    return _Box(((*begin, 0), (*counts, found.stored[-1])), (begin, counts), (offsets[-1] - first * numbers,))
