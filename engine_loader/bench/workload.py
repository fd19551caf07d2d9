"""What is loaded: the tensors of a checkpoint, and memory for them like a model's parameters."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .. import open_checkpoint
from ..formats.dtypes import torch_dtype, torch_shape
from ..formats.safetensors import TensorInfo
from ..loading.find import PathLike
from ..machine import usable_cpus

# torch's CPU allocator hands out large tensors 64 bytes into a page: parameters are not page-aligned.
_INTO_PAGE_BYTES = 64
_POISON = b"\xa5" * (1 << 20)


@dataclass(frozen=True)
class Workload:
    """What every contender loads.

    Attributes:
        path: for open_checkpoint.
        files: the files, in order.
        tensors: the tensors, in file order.
    """

    path: PathLike | Sequence[PathLike]
    files: tuple[str, ...]
    tensors: tuple[TensorInfo, ...]

    @classmethod
    def of(cls, path: PathLike, first_files: int | None = None) -> Workload:
        """The checkpoint at ``path``, or its first files only.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        with open_checkpoint(path) as checkpoint:
            tensors = list(map(checkpoint.info, checkpoint.keys()))
        files = list(dict.fromkeys(info.file for info in tensors))
        if first_files is None or first_files >= len(files):
            return cls(path, tuple(files), tuple(tensors))
        files = files[:first_files]
        return cls(files, tuple(files), tuple(info for info in tensors if info.file in files))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors)

    def checksums(self) -> dict[str, int]:
        """The CRC of every tensor's bytes, read from the files in the plainest way."""
        with ThreadPoolExecutor(usable_cpus()) as threads:
            sums = threads.map(_file_checksum, self.tensors)
            return {info.name: checksum for info, checksum in zip(self.tensors, sums, strict=True)}


class Parameters:
    """Memory for the tensors of a workload, by name; not touched before it is first written to."""

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        self._infos = {info.name: info for info in infos}
        self._places: dict[str, int] = {}
        end = 0
        for info in infos:
            self._places[info.name] = end + _INTO_PAGE_BYTES
            end = -(-(end + _INTO_PAGE_BYTES + info.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, max(end, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensors = {info.name: self._tensor(info) for info in infos}

    def poison(self) -> None:
        """Fill the memory with bytes that no one loads; this touches every page."""
        for begin in range(0, len(self._memory), len(_POISON)):
            end = min(begin + len(_POISON), len(self._memory))
            self._memory[begin:end] = _POISON[: end - begin]

    def checksums(self) -> dict[str, int]:
        """The CRC of every tensor's bytes."""
        view = memoryview(self._memory)

        def checksum(info: TensorInfo) -> int:
            place = self._places[info.name]
            return zlib.crc32(view[place : place + info.nbytes])

        with ThreadPoolExecutor(usable_cpus()) as threads:
            return dict(zip(self._infos, threads.map(checksum, self._infos.values()), strict=True))

    def _tensor(self, info: TensorInfo) -> torch.Tensor:
        dtype, shape = torch_dtype(info.dtype), torch_shape(info.dtype, info.shape)
        if not info.nbytes:
            return torch.empty(shape, dtype=dtype)
        count, place = info.nbytes // dtype.itemsize, self._places[info.name]
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=place).view(shape)


def _file_checksum(info: TensorInfo) -> int:
    checksum = 0
    fd = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = info.offset + info.nbytes
        for offset in range(info.offset, end, len(_POISON)):
            checksum = zlib.crc32(os.pread(fd, min(len(_POISON), end - offset), offset), checksum)
    finally:
        os.close(fd)
    return checksum
