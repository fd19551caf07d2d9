"""The tensors of a checkpoint that are loaded, and memory for them like a model's parameters."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .. import open_checkpoint
from ..failures import end_of_file
from ..formats.dtypes import torch_dtype, torch_shape
from ..formats.safetensors import TensorInfo
from ..loading.find import PathLike
from ..machine import usable_cpus
from ..settings import load_settings
from ..sources.registry import is_remote, make_source
from ..sources.source import SourceFile

# torch's CPU allocator hands out large tensors 64 bytes into a page: parameters are not page-aligned.
_INTO_PAGE_BYTES = 64
_POISON = b"\xa5" * (1 << 20)
_REMOTE_BYTES = 8 << 20
_REMOTE_THREADS = 16


@dataclass(frozen=True)
class Workload:
    """The tensors that every contender loads.

    Attributes:
        path: the checkpoint, for open_checkpoint.
        files: paths, in the order of reading.
        tensors: in file order.
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
    def remote(self) -> bool:
        """Whether these are objects of an object store, which no page cache holds."""
        return is_remote(self.files[0])

    def open_files(self) -> dict[str, SourceFile]:
        """The files by path, open for plain reads; the caller closes them."""
        source = make_source("auto" if self.remote else "posix", settings=load_settings().settings.loader)
        opened: dict[str, SourceFile] = {}
        try:
            for path in self.files:
                opened[path] = source.open(path)
        except BaseException:
            for file in opened.values():
                file.close()
            raise
        return opened

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors)

    def checksums(self) -> dict[str, int]:
        """The CRC of every tensor's bytes, by name, read from the files by plain reads."""
        files = self.open_files()
        try:
            with ThreadPoolExecutor(_REMOTE_THREADS if self.remote else usable_cpus()) as threads:
                sums = threads.map(lambda info: _file_checksum(files[info.file], info), self.tensors)
                return {info.name: checksum for info, checksum in zip(self.tensors, sums, strict=True)}
        finally:
            for file in files.values():
                file.close()


class Parameters:
    """Memory for the tensors of a workload, by name. Its pages are made when they are first written."""

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        self._infos = {info.name: info for info in infos}
        self._offsets: dict[str, int] = {}
        end = 0
        for info in infos:
            self._offsets[info.name] = end + _INTO_PAGE_BYTES
            end = -(-(end + _INTO_PAGE_BYTES + info.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, max(end, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensors = {info.name: self._tensor(info) for info in infos}

    def poison(self) -> None:
        """Fill the memory with a pattern that differs from the files; this touches every page."""
        for begin in range(0, len(self._memory), len(_POISON)):
            end = min(begin + len(_POISON), len(self._memory))
            self._memory[begin:end] = _POISON[: end - begin]

    def checksums(self) -> dict[str, int]:
        """The CRC of every tensor's bytes in this memory, by name."""
        view = memoryview(self._memory)

        def checksum(info: TensorInfo) -> int:
            offset = self._offsets[info.name]
            return zlib.crc32(view[offset : offset + info.nbytes])

        with ThreadPoolExecutor(usable_cpus()) as threads:
            return dict(zip(self._infos, threads.map(checksum, self._infos.values()), strict=True))

    def _tensor(self, info: TensorInfo) -> torch.Tensor:
        dtype, shape = torch_dtype(info.dtype), torch_shape(info.dtype, info.shape)
        if not info.nbytes:
            return torch.empty(shape, dtype=dtype)
        count, offset = info.nbytes // dtype.itemsize, self._offsets[info.name]
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)


def _file_checksum(file: SourceFile, info: TensorInfo) -> int:
    checksum = 0
    buffer = memoryview(bytearray(min(_REMOTE_BYTES if file.remote else len(_POISON), max(info.nbytes, 1))))
    offset, end = info.offset, info.offset + info.nbytes
    while offset < end:
        piece = buffer[: end - offset]
        got = file.read_into(offset, [piece])
        if not got:
            raise end_of_file(file.path, offset, file.size)
        checksum = zlib.crc32(piece[:got], checksum)
        offset += got
    return checksum
