"""GPUDirect Storage: blocks that go from a local file to a device past the CPU's memory, by fastsafetensors' copier.

Where that cannot be done it says why; fastsafetensors itself would read in another way and only warn.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ...errors import CheckpointError, SettingsError, TransferError
from ...formats.safetensors import TensorInfo
from ...report.load_report import LoadReport
from ...sources.source import SourceFile
from ..devices.cuda import Devices
from ..devices.per_tensor import TargetDevice
from .blocks import Block, file_blocks, shaped
from .filling import FreshMemoryFiller
from .stream import stream_tensors

if TYPE_CHECKING:
    from ...settings import LoaderSettings

HINT = "set transport to auto"
_DEVICE_NODE = "/dev/nvidia-fs0"
_THREADS = 16
_ALIGN = 16  # of tensors that are handed out
_BLOCKS_IN_BUFFER = 8
_COMPARED_BYTES = 1 << 20
_MOST_BYTES = 1 << 40  # of one request

_compared: set[int] = set()  # devices whose first block was as it should be, in this process


def gds_error(why: str) -> SettingsError:
    """The error where the setting ``transport: gds`` cannot be followed."""
    return SettingsError(f"transport: gds cannot serve here: {why}; {HINT}")


def gds_is_asked_for(settings: LoaderSettings) -> bool:
    """Whether the settings ask for GPUDirect Storage, which reads whole tensors only."""
    return settings.transport == "gds"


def obstacle_to_gds(device: int) -> str | None:
    """Why GPUDirect Storage cannot be used on a device; None where it can, as far as can be told without reading.

    Args:
        device: its number in the runtime.
    """
    try:
        from fastsafetensors import cpp
        from fastsafetensors.copier import GdsFileCopier
        from fastsafetensors.copier.gds import init_gds
        from fastsafetensors.copier.nogds import load_library_func
    except ImportError as error:
        return f"fastsafetensors cannot be imported ({error})"
    if not hasattr(GdsFileCopier, "set_chunk"):
        return "this fastsafetensors cannot read parts of files: 0.5 or later is needed"
    framework = _framework()
    try:
        load_library_func(framework)
    except Exception as error:  # it raises nothing more special
        return f"fastsafetensors finds no CUDA: libcudart.so must be in the path of the dynamic linker ({error})"
    if not cpp.is_cuda_found() and not cpp.is_hip_found():
        return "fastsafetensors finds no GPU by libcudart.so (or libamdhip64.so) in the path of the dynamic linker"
    # Without the node, opening cuFile's driver fails and closes descriptor 0, whatever that is (fastsafetensors).
    if not cpp.is_hip_found() and not os.path.exists(_DEVICE_NODE):
        return f"{_DEVICE_NODE} is not there: the kernel module nvidia-fs is not loaded, or not shown to this container"
    if not cpp.is_cufile_found():
        return "libcufile.so.0 (ROCm: libhipfile.so) is not in the path of the dynamic linker"
    if cpp.is_gds_supported(device) <= 0:
        return f"device {device} has no GPUDirect RDMA"
    try:
        init_gds(framework)
    except Exception as error:
        return f"cuFile's driver cannot be opened ({error}): see cufile.log, and gdscheck -p"
    return None


class _BlockMemory:
    """What the copier asks of a framework: memory, here of one block. It is a tensor, which views of it keep alive."""

    def __init__(self, empty: Callable[[int], torch.Tensor], synchronize: Callable[[], object]) -> None:
        self._empty = empty
        self._synchronize = synchronize
        self.tensor: torch.Tensor | None = None

    def get_cuda_ver(self) -> Any:
        return _framework().get_cuda_ver()

    def alloc_tensor_memory(self, nbytes: int, device: object) -> Any:
        from fastsafetensors import cpp

        self.tensor = self._empty(nbytes)
        # Whoever had this memory before may still be using it on the current stream, for which reads do not wait.
        self._synchronize()
        return cpp.gds_device_buffer(self.tensor.data_ptr(), nbytes, True)

    def free_tensor_memory(self, buffer: object, device: object) -> None:
        self.tensor = None


@dataclass(slots=True)
class _Copying:
    """A block that a copier puts into the memory of a device."""

    block: Block
    filler: GdsFiller
    copier: Any
    memory: _BlockMemory

    def wait(self) -> None:
        first = self.block.tensors[0]
        try:
            self.copier.finish_io()
        except Exception as error:
            raise _failed(first.file, first.offset, error) from error
        self.filler.check(self)

    def content(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of the block, by their offset in the file."""
        assert self.memory.tensor is not None
        return self.memory.tensor.narrow(0, offset - self.copier.aligned_offset, nbytes)

    def tensor(self, index: int) -> torch.Tensor:
        info = self.block.tensors[index]
        if not info.nbytes:
            return shaped(self.filler.empty(0), info, 0)
        content = self.content(info.offset, info.nbytes)
        if content.data_ptr() % _ALIGN:
            content = content.clone()
        return shaped(content, info, 0)

    def cancel(self) -> None:
        with contextlib.suppress(Exception):
            self.copier.finish_io()
        self.release()

    def release(self) -> None:
        self.memory.tensor = None


class GdsFiller(FreshMemoryFiller[_Copying]):
    """Blocks that are copied from their file to memory of a device, which is made for each of them.

    Reads have no deadline, for the library's have none.

    Args:
        files: by path.
        device: the number of the device.
        synchronize: waits for what is on the current stream of the device.
        empty: so many fresh bytes there.
        read_back: a copy of a tensor in the CPU's memory.
        buffer_bytes: the budget.
        block_bytes: of a block, at least where tensors are that large. Each costs a registration of the file and of its
            memory, so they are an eighth of the budget if that is more.
        threads: that read.
        count: called with the bytes of each block that is read.
    """

    def __init__(
        self,
        files: Mapping[str, SourceFile],
        device: int,
        *,
        synchronize: Callable[[], object],
        empty: Callable[[int], torch.Tensor],
        read_back: Callable[[torch.Tensor], torch.Tensor],
        buffer_bytes: int,
        block_bytes: int,
        threads: int | None,
        count: Callable[[int], object],
    ) -> None:
        from fastsafetensors import cpp

        super().__init__(buffer_bytes)
        cpp.set_gil_release(True)
        self.empty = empty
        self._files = files
        self._device = device
        self._synchronize = synchronize
        self._read_back = read_back
        self._block_bytes = max(block_bytes, buffer_bytes // _BLOCKS_IN_BUFFER)
        self._count = count
        self._reader = cpp.gds_file_reader(threads or _THREADS, True, device)
        self._metadata: dict[str, Any] = {}

    def blocks(self, infos: Iterable[TensorInfo]) -> Iterator[Block]:
        return file_blocks(infos, self._block_bytes)

    def _begin(self, block: Block) -> _Copying:
        memory = _BlockMemory(self.empty, self._synchronize)
        copier = self._copier(block, memory)
        self._count(sum(info.nbytes for info in block.tensors))
        return _Copying(block, self, copier, memory)

    def check(self, copying: _Copying) -> None:
        """Compare the first bytes that this process reads to a device with what the file holds.

        What a driver, a container or a virtual machine may get wrong shows here, before a model is filled with it.

        Raises:
            TransferError: they are not the same.
        """
        first, nbytes = copying.block.tensors[0], min(_span(copying.block), _COMPARED_BYTES)
        if self._device in _compared or not nbytes:
            return
        expected = bytearray(nbytes)
        done = 0
        while done < nbytes:
            got = self._files[first.file].read_into(first.offset + done, [memoryview(expected)[done:]])
            if not got:
                raise TransferError("the file ends too early", file=first.file, offset=first.offset + done)
            done += got
        found = self._read_back(copying.content(first.offset, nbytes))
        wrong = int((found != torch.frombuffer(expected, dtype=torch.uint8)).sum())
        if wrong:
            message = f"GPUDirect Storage got {wrong} of the first {nbytes} bytes wrong"
            raise TransferError(message, file=first.file, offset=first.offset, hint=HINT)
        _compared.add(self._device)

    def _copier(self, block: Block, memory: _BlockMemory) -> Any:
        from fastsafetensors.copier import GdsFileCopier
        from fastsafetensors.st_types import Device, DeviceType

        first, nbytes = block.tensors[0], _span(block)
        device = Device(DeviceType.CUDA, self._device)
        try:
            metadata = self._metadata_of(first.file)
            # In place of the reader that the copier would fall back to without a word to its caller.
            refuse = [lambda *_: _refuse(first.file)]
            copier = GdsFileCopier(metadata, device, self._reader, memory, fallback_cache=refuse)
            runs = [(first.offset, first.offset + nbytes)] if nbytes else []
            copier.set_chunk(runs, {info.name for info in block.tensors})
            copier.submit_io(True, _MOST_BYTES)
        except CheckpointError:
            raise
        except Exception as error:
            raise _failed(first.file, first.offset, error) from error
        return copier

    def _metadata_of(self, path: str) -> Any:
        if path not in self._metadata:
            from fastsafetensors import SafeTensorsMetadata

            self._metadata[path] = SafeTensorsMetadata.from_file(path, _framework())
        return self._metadata[path]


class GpuDirectStorage:
    """The transport ``gds``: whole tensors, from local files to a device past the CPU's memory.

    Args:
        files: by path.
        devices: that tensors are put on.
        settings: how to read.
    """

    def __init__(self, files: Mapping[str, SourceFile], devices: Devices, settings: LoaderSettings) -> None:
        self._files = files
        self._devices = devices
        self._settings = settings

    def device_of(self, tensor: torch.Tensor) -> int | None:
        if tensor.device.type == "cpu":
            raise gds_error("these tensors are in the CPU's memory")
        return None

    def staging(self, target: torch.Tensor) -> torch.device:
        return target.device

    def stream(
        self, infos: Iterable[TensorInfo], report: LoadReport, device: TargetDevice
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if not isinstance(device, torch.device):
            raise gds_error("these tensors go to the CPU's memory")
        filler = self._filler(device, report)
        return stream_tensors(infos, lambda info: filler, report)

    def _filler(self, device: torch.device, report: LoadReport) -> GdsFiller:
        if device.type != "cuda":
            raise gds_error(f"these tensors go to {device.type!r}, not to a CUDA device")
        other = next((file for file in self._files.values() if file.source != "posix"), None)
        if other is not None:
            raise gds_error(f"it reads local files, and {other.path} is read by {other.source}")
        number = self._devices.index(device)
        obstacle = obstacle_to_gds(number)
        if obstacle is not None:
            raise gds_error(obstacle)
        return GdsFiller(
            self._files,
            number,
            synchronize=lambda: self._devices.synchronize(number),
            empty=lambda nbytes: self._devices.empty(nbytes, device),
            read_back=self._devices.read_back,
            buffer_bytes=int(self._settings.device_buffer_bytes),
            block_bytes=int(self._settings.block_bytes),
            threads=self._settings.threads,
            count=report.count_bytes_by_gds,
        )


def _span(block: Block) -> int:
    """Bytes from a block's beginning to its end."""
    return max(info.offset + info.nbytes for info in block.tensors) - block.tensors[0].offset


def _framework() -> Any:
    from fastsafetensors.frameworks import get_framework_op

    return get_framework_op("pytorch")


def _refuse(path: str) -> NoReturn:
    raise TransferError("cuFile refuses this file: its file system cannot do GPUDirect Storage", file=path, hint=HINT)


def _failed(path: str, offset: int, error: Exception) -> TransferError:
    if isinstance(error, TransferError):
        return error
    return TransferError(f"GPUDirect Storage could not read: {error}", file=path, offset=offset, hint=HINT)
