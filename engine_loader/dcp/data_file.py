"""Writes the items of one data file of a DCP checkpoint into a stream."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from ..errors import CheckpointError
from .file_layout import is_tensor
from .safetensors_items import tensor_bytes, write_header


class DataFile:
    """One data file while it is written.

    Args:
        name: relative to the checkpoint's directory.
        stream: the file, opened for writing.
        planner: has the data of the items.
        transforms: torch's chain of extensions for the items' streams.
        copy_ahead_bytes: bytes to copy from a GPU ahead of writing; 0: each tensor is copied when it is written.
    """

    def __init__(
        self,
        name: str,
        stream: io.BufferedIOBase,
        planner: SavePlanner,
        transforms: torch_filesystem._StorageWriterTransforms,
        copy_ahead_bytes: int,
    ) -> None:
        self._name, self._stream, self._planner, self._transforms = name, stream, planner, transforms
        self._copy_ahead_bytes = copy_ahead_bytes

    def write(self, items: Sequence[WriteItem]) -> list[WriteResult]:
        """Write pickled items as they are, then tensors in the format of ``torch.save``."""
        tensors = [item for item in items if is_tensor(item)]
        results = [self._write_bytes(item) for item in items if not is_tensor(item)]
        for item, tensor in self._on_cpu(tensors):
            results.append(self._write_item(item, partial(torch.save, tensor)))
        return results

    def write_safetensors(self, tensors: Sequence[WriteItem]) -> list[WriteResult]:
        """Write a safetensors file: the header, then tensor after tensor, of which one at a time is in memory.

        Raises:
            CheckpointError: safetensors cannot hold a tensor, or a tensor differs from its plan.
        """
        results: list[WriteResult] = []
        locations = write_header(self._stream, tensors)
        for item, tensor in self._on_cpu([item for item, _, _ in locations]):
            _, offset, nbytes = locations[len(results)]
            _check_planned(item, tensor)
            self._stream.write(tensor_bytes(tensor))
            results.append(self._result(item, offset, nbytes, None))
        return results

    def _write_bytes(self, item: WriteItem) -> WriteResult:
        data = self._planner.resolve_data(item)
        assert isinstance(data, io.BytesIO)
        return self._write_item(item, lambda to: to.write(data.getbuffer()))

    def _write_item(self, item: WriteItem, write: Callable[[Any], object]) -> WriteResult:
        """Write an item through the transforms."""
        begin = self._stream.tell()
        to, descriptors = self._transforms.transform_save_stream(item, cast(io.IOBase, self._stream))
        write(to)
        to.close()
        return self._result(item, begin, self._stream.tell() - begin, list(descriptors) or None)

    def _on_cpu(self, items: Sequence[WriteItem]) -> Iterator[tuple[WriteItem, torch.Tensor]]:
        """(item, tensor in CPU memory that holds nothing else) in the order of the items."""
        loader: torch_filesystem._TensorLoader
        if self._copy_ahead_bytes > 0 and torch.cuda.is_available():
            loader = torch_filesystem._OverlappingCpuLoader(
                self._planner.resolve_data, inflight_threshhold=self._copy_ahead_bytes
            )
        else:
            loader = torch_filesystem._SerialCpuLoader(self._planner.resolve_data)
        for number, item in enumerate(items):
            loader.add(number, item)  # the loader sorts by this number
        loader.start_loading()
        for tensor, loaded in loader.values():
            yield cast(WriteItem, loaded), tensor

    def _result(self, item: WriteItem, offset: int, length: int, descriptors: list[str] | None) -> WriteResult:
        info = _StorageInfo(self._name, offset, length, transform_descriptors=descriptors)
        return WriteResult(index=item.index, size_in_bytes=length, storage_data=info)


def _check_planned(item: WriteItem, tensor: torch.Tensor) -> None:
    data = item.tensor_data
    assert data is not None
    if tensor.dtype != data.properties.dtype or tensor.shape != data.chunk.sizes:
        raise CheckpointError(
            f"{item.index.fqn!r} was planned as {data.properties.dtype} {list(data.chunk.sizes)} "
            f"and came as {tensor.dtype} {list(tensor.shape)}"
        )
