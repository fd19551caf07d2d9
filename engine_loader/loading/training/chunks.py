"""Reads tensors of a training checkpoint chunk by chunk, of whatever kind the items are."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import CheckpointError
from ...formats.safetensors import TensorInfo
from ...report.load_report import LoadReport
from ...transfer.protocol import Transfer
from .boxes import BoxRead, StoredTensor
from .files import DcpFiles
from .items import Items
from .tensors import DcpChunk, DcpTensor
from .torch_load import check_not_quantised, load_item

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo


class ChunkReader:
    """Puts tensors together from their chunks. May be used from several threads.

    Args:
        files: the checkpoint's files.
        buffer_bytes: how much may be read ahead.

    Attributes:
        items: finds out where in the files its chunks lie.
    """

    def __init__(self, files: DcpFiles, buffer_bytes: int) -> None:
        self._files = files
        self.items = Items(files)
        self._buffer_bytes = buffer_bytes

    def locate(self, tensors: Sequence[DcpTensor]) -> list[list[StoredTensor | None]]:
        """Where the chunks of each tensor lie; None for what is no plain bytes.

        All at once: one after the other would wait for what is being read.

        Raises:
            CheckpointError: an item does not lie within its file, or its file does not have it.
        """
        chunks = iter(self.items.locate([(t.stored_name, chunk.stored) for t in tensors for chunk in t.chunks]))
        return [[next(chunks) for _ in tensor.chunks] for tensor in tensors]

    def stream(
        self, tensors: Sequence[tuple[DcpTensor, TensorInfo]], report: LoadReport
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, CPU tensor) in order while the next ones are read.

        Raises:
            CheckpointError: the bytes could not be read, or are not what the metadata says.
        """
        for tensor, info in tensors:
            check_not_quantised(tensor.dtype, tensor.stored_name, info.file, info.offset)
        self.locate([tensor for tensor, _ in tensors])
        flying: deque[tuple[TensorInfo, torch.Tensor, Transfer | None, list[BoxRead]]] = deque()
        coming = iter(tensors)
        nbytes = peak_bytes = 0
        try:
            while True:
                for tensor, info in coming:
                    target = _empty(tensor)
                    reads = self._reads(tensor, target)
                    flying.append((info, target, self._files.submit(reads), reads))
                    nbytes += tensor.nbytes
                    peak_bytes = max(peak_bytes, nbytes)
                    if nbytes >= self._buffer_bytes:
                        break
                if not flying:
                    break
                info, target, transfer, reads = flying[0]
                if transfer is not None:
                    transfer.wait()
                for read in reads:
                    read.finish()
                flying.popleft()
                nbytes -= info.nbytes
                report.count_tensor(info)
                del reads, transfer
                yield info.name, target
        finally:
            for _, _, transfer, _ in flying:
                if transfer is not None:
                    transfer.cancel()
            report.note_peak_buffer(peak_bytes)

    def read_item(self, stored: _StorageInfo, name: str) -> bytes:
        """All bytes of an item, as the writer gave them.

        Raises:
            CheckpointError: they cannot be read, or were transformed when they were saved.
        """
        self._check_plain(name, stored)
        return self._files.read_item(stored, name)

    def _reads(self, tensor: DcpTensor, target: torch.Tensor) -> list[BoxRead]:
        """The reads that bring a tensor to ``target``, one of each chunk; what is no plain bytes is read at once."""
        reads = []
        (located,) = self.locate([tensor])
        for chunk, stored in zip(tensor.chunks, located, strict=True):
            within = target
            for dim, (first, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                within = within.narrow(dim, first, size)
            if stored is not None and stored.shape == chunk.sizes and stored.dtype == tensor.dtype:
                reads.append(self._files.part(stored, [0] * len(chunk.sizes), chunk.sizes, within))
            else:
                within.copy_(self._load(tensor, chunk))
        return reads

    def _load(self, tensor: DcpTensor, chunk: DcpChunk) -> torch.Tensor:
        """A chunk that is not plain bytes."""
        path = os.path.join(self._files.directory, chunk.stored.relative_path)
        content = self.read_item(chunk.stored, tensor.stored_name)
        whole = load_item(content, tensor.stored_name, path, chunk.stored.offset)
        if tuple(whole.shape) != chunk.sizes or whole.dtype != tensor.dtype:
            raise misfit(tensor, chunk, whole.dtype, whole.shape, path)
        return whole

    def _check_plain(self, name: str, stored: _StorageInfo) -> None:
        if stored.transform_descriptors:
            raise CheckpointError(
                f"{name!r} was transformed when it was saved ({stored.transform_descriptors})",
                file=os.path.join(self._files.directory, stored.relative_path),
                hint="load it by dcp.load with engine_loader.dcp.FileSystemReader, and save it without transforms",
            )


def misfit(tensor: DcpTensor, chunk: DcpChunk, dtype: torch.dtype, shape: Sequence[int], path: str) -> CheckpointError:
    """The error where a chunk is stored with another element type or shape than the metadata says."""
    return CheckpointError(
        f"{tensor.stored_name!r} is {dtype} {list(shape)} in the file, "
        f"but {tensor.dtype} {list(chunk.sizes)} by the metadata",
        file=path,
        offset=chunk.stored.offset,
        hint="metadata and files are of different saves: copy the checkpoint again",
    )


def _empty(tensor: DcpTensor) -> torch.Tensor:
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    except RuntimeError as error:
        raise CheckpointError(f"no memory for {tensor.name!r}: {str(error).splitlines()[0]}") from None
