"""How tensors of safetensors files reach memory: through the CPU's (here), or by GPUDirect Storage (gds.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch

from ...formats.safetensors import TensorInfo
from ...report.load_report import LoadReport
from ...sources.source import SourceFile
from ...transfer.device_stream import DeviceStream
from ...transfer.modes import can_map
from ...transfer.native.native_readers import NativeReaders
from ...transfer.protocol import ReaderThreads
from ..devices.cuda import Devices
from ..devices.per_tensor import PerTensor, TargetDevice, gpu_of, is_on_cpu
from ..store import device_for
from .filling import DeviceFiller, PooledFiller
from .gds import GpuDirectStorage, gds_is_asked_for
from .mapped import MappedFiller
from .stream import AnyFiller, stream_tensors

if TYPE_CHECKING:
    from ...settings import LoaderSettings


class Transport(Protocol):
    """One way to move tensors; the setting ``transport`` chooses it, once. Methods are those of ``TensorStore``."""

    def device_of(self, tensor: torch.Tensor) -> int | None: ...

    def staging(self, target: torch.Tensor) -> torch.device: ...

    def stream(
        self, infos: Iterable[TensorInfo], report: LoadReport, device: TargetDevice
    ) -> Iterator[tuple[str, torch.Tensor]]: ...


def make_transport(
    files: Mapping[str, SourceFile], devices: Devices, settings: LoaderSettings, readers: Callable[[], ReaderThreads]
) -> Transport:
    """The transport that the settings name.

    Args:
        files: by path.
        devices: that tensors may be put on.
        settings: how to read.
        readers: the threads that read, which it may start.
    """
    if gds_is_asked_for(settings):
        return GpuDirectStorage(files, devices, settings)
    return ThroughMemory(files, devices, settings, readers)


class ThroughMemory:
    """The transport ``auto``: reads and mapped pages; to a device, through page-locked memory.

    Where the running threads cannot put bytes on a device, torch copies them there.
    """

    def __init__(
        self,
        files: Mapping[str, SourceFile],
        devices: Devices,
        settings: LoaderSettings,
        readers: Callable[[], ReaderThreads],
    ) -> None:
        self._files = files
        self._devices = devices
        self._settings = settings
        self._readers = readers
        self._block_bytes = int(settings.block_bytes)

    def device_of(self, tensor: torch.Tensor) -> int | None:
        return device_for(tensor, self._devices, self._readers)

    def staging(self, target: torch.Tensor) -> torch.device:
        return torch.device("cpu")

    def stream(
        self, infos: Iterable[TensorInfo], report: LoadReport, device: TargetDevice
    ) -> Iterator[tuple[str, torch.Tensor]]:
        gpu, readers = gpu_of(device), self._readers()
        number = None if gpu is None else self._devices.number(gpu)
        if gpu is not None and number is not None and isinstance(readers, NativeReaders):
            to_device = self._device_filler(readers, gpu, number)
            if not isinstance(device, PerTensor):
                return stream_tensors(infos, lambda info: to_device, report)
            into_memory = self._filler_of(readers, report)
            return stream_tensors(
                infos, lambda info: into_memory(info) if device.is_on_cpu(info.name) else to_device, report
            )
        pairs = stream_tensors(infos, self._filler_of(readers, report), report)
        if gpu is None:
            return pairs
        return ((name, tensor if is_on_cpu(device, name) else tensor.to(gpu)) for name, tensor in pairs)

    def _device_filler(self, readers: NativeReaders, device: torch.device, number: int) -> DeviceFiller:
        return DeviceFiller(
            self._files,
            readers,
            current=lambda: DeviceStream(number, self._devices.stream(number)),
            empty=lambda nbytes: self._devices.empty(nbytes, device),
            buffer_bytes=int(self._settings.device_buffer_bytes),
            block_bytes=self._block_bytes,
        )

    def _filler_of(self, readers: ReaderThreads, report: LoadReport) -> Callable[[TensorInfo], AnyFiller]:
        """How each file is brought into memory: mapped where it lies in memory anyway, else read into buffers."""
        buffer_bytes = int(self._settings.buffer_bytes)
        pooled = PooledFiller(self._files, readers, buffer_bytes=buffer_bytes, block_bytes=self._block_bytes)
        if not isinstance(readers, NativeReaders) or self._settings.read_mode not in ("auto", "mapped"):
            return lambda info: pooled
        mapped = MappedFiller(self._files, buffer_bytes=buffer_bytes, count=report.count_bytes_mapped)
        always = self._settings.read_mode == "mapped"

        @cache
        def mappable(path: str) -> bool:
            return can_map(self._files[path], always=always)

        def choose(info: TensorInfo) -> AnyFiller:
            return mapped if mappable(info.file) and (always or not mapped.consumer_keeps) else pooled

        return choose
