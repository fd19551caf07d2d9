"""The store of tensors in safetensors files."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError, TransferError
from ..formats.safetensors import TensorInfo
from ..report.load_report import LoadReport
from ..sources.source import SourceFile
from ..transfer.constructor import make_readers_for
from ..transfer.device_stream import DeviceStream
from ..transfer.plan import ExtentRow, make_extents
from ..transfer.protocol import ReaderThreads, Transfer
from .devices.cuda import CudaDevices, Devices
from .devices.per_tensor import TargetDevice, gpu_of
from .shards import OpenFiles
from .store import TensorStore, complete_report, submit_to
from .streaming.transports import make_transport

if TYPE_CHECKING:
    from ..settings import LoaderSettings
    from .sharing import NodeRanks, NodeSharing


class SafetensorsStore(TensorStore):
    """The tensors of open safetensors files.

    Args:
        files: the open files, which it closes.
        source: the name of where they are, for the report.
        settings: how to read.
        devices: whose memory can be read into beside the CPU's; None: torch's.
        ranks: of this machine, that load the same files; None: this process alone.
    """

    key_mapping_applies = False
    streams_to_devices = True

    def __init__(
        self,
        files: OpenFiles,
        source: str,
        settings: LoaderSettings,
        devices: Devices | None = None,
        ranks: NodeRanks | None = None,
    ) -> None:
        self.files = files
        self._source = source
        self._settings = settings
        self._devices: Devices = CudaDevices(settings) if devices is None else devices
        self._open = {opened.file.path: opened.file for opened in files.files}
        self.paths = list(self._open)
        self.listing = self.paths[0]
        self._numbers = {path: number for number, path in enumerate(self._open)}
        self._readers: ReaderThreads | None = None
        self._sharing = _sharing_of(list(self._open.values()), files, settings, ranks)
        self._lock = threading.Lock()
        self._closed = False
        self._transport = make_transport(self._open, self._devices, settings, self._running_readers)

    @property
    def infos(self) -> list[TensorInfo]:
        return self.files.tensors

    def by_name(self) -> dict[str, TensorInfo]:
        infos = self.files.by_name()
        self.lacking = self.files.lacking
        return infos

    def metadata(self) -> dict[str, str]:
        merged: dict[str, str] = {}
        for opened in reversed(self.files.files):
            merged.update(opened.header.metadata)
        return merged

    def located(self, infos: Sequence[TensorInfo]) -> Sequence[TensorInfo]:
        return infos

    def dtype_and_shape(self, info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
        return info.as_torch()

    def has_extents(self, info: TensorInfo) -> bool:
        return True

    def file_number(self, info: TensorInfo) -> int:
        return self._numbers[info.file]

    def device_of(self, tensor: torch.Tensor) -> int | None:
        return self._transport.device_of(tensor)

    def staging(self, target: torch.Tensor) -> torch.device:
        return self._transport.staging(target)

    def submit(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> Transfer:
        stream = None if device is None else DeviceStream(device, self._devices.stream(device))
        readers, plan = self._running_readers(), make_extents(extents)
        shared = None if self._sharing is None else self._sharing.submit(readers, plan, owner, stream)
        return shared or submit_to(stream, readers, list(self._open.values()), plan, owner)

    def stream(
        self, infos: Iterable[TensorInfo], report: LoadReport, device: TargetDevice = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        pairs = self._transport.stream(infos, report, device)
        gpu = gpu_of(device)
        if gpu is None or gpu.type == "cpu":
            yield from pairs
            return
        try:
            yield from pairs
        except TransferError as error:
            raise self.named(error) from error

    def tensor_at(self, file: str | None, offset: int | None) -> str | None:
        for info in self.files.tensors:
            if info.file == file and offset is not None and info.offset <= offset < info.offset + info.nbytes:
                return info.name
        return None

    def finish(self, report: LoadReport) -> None:
        self.files.verify_unchanged()
        complete_report(report, self._source, self._running_readers())
        if self._sharing is not None:
            self._sharing.complete_report(report)

    def close(self) -> None:
        if self._sharing is not None:
            self._sharing.close()
        with self._lock:
            self._closed = True
            readers, self._readers = self._readers, None
        try:
            if readers is not None:
                readers.close()
        finally:  # Ctrl-C may end the wait for the threads
            self.files.close()

    def _running_readers(self) -> ReaderThreads:
        with self._lock:
            if self._closed:
                raise CheckpointError("the checkpoint is closed")
            if self._readers is None:
                self._readers = make_readers_for(self._open.values(), self._settings)
            return self._readers


def _sharing_of(
    files: Sequence[SourceFile], opened: OpenFiles, settings: LoaderSettings, ranks: NodeRanks | None
) -> NodeSharing | None:
    """What is shared with other ranks of this machine; None: nothing is."""
    if ranks is None or ranks.count <= 1 or settings.share == "off":
        return None
    from .sharing import NodeSharing

    return NodeSharing(files, opened.tensors, settings, ranks)
