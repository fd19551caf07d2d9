"""Open files together with the reader threads: what every way of loading stands on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Self

import torch

from ..errors import CheckpointError, SettingsError, TransferError
from ..formats.safetensors import TensorInfo
from ..report.load import LoadReport
from ..settings import LoaderSettings
from ..sources.source import SourceFile
from ..transfer.constructor import make_readers_for
from ..transfer.device_stream import DeviceStream
from ..transfer.modes import can_map
from ..transfer.native.native_readers import NativeReaders
from ..transfer.plan import ExtentRow, Extents, make_extents
from ..transfer.protocol import ReaderThreads, Transfer, wait_or_cancel
from .devices.cuda import CudaDevices, Devices
from .find import OpenFiles
from .streaming.filling import DeviceFiller, PooledFiller
from .streaming.gds import HINT, GdsFiller, obstacle_to_gds
from .streaming.mapped import MappedFiller
from .streaming.stream import AnyFiller, stream_tensors


class Reader:
    """Reads tensors of open files. May be used from several threads; owns the files and closes them.

    Args:
        files: the open files.
        source: the name of where they are, for the report.
        settings: how to read.
        devices: whose memory can be read into beside the CPU's; None: torch's.
    """

    def __init__(self, files: OpenFiles, source: str, settings: LoaderSettings, devices: Devices | None = None) -> None:
        self.files = files
        self._source = source
        self._settings = settings
        self._devices: Devices = CudaDevices(settings) if devices is None else devices
        self._open = {opened.file.path: opened.file for opened in files.files}
        self._numbers = {path: number for number, path in enumerate(self._open)}
        self._readers: ReaderThreads | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def infos(self) -> list[TensorInfo]:
        """Every tensor of every file, in file order."""
        return self.files.tensors

    @property
    def paths(self) -> list[str]:
        """The files."""
        return list(self._open)

    def has_extents(self, info: TensorInfo) -> bool:
        """Whether parts of a tensor can be asked for as extents: here, always."""
        return True

    def file_number(self, info: TensorInfo) -> int:
        """The number of a tensor's file in the extents that ``read`` takes."""
        return self._numbers[info.file]

    def device_of(self, tensor: torch.Tensor) -> int | None:
        """The device, as ``read`` takes it, into whose memory a tensor can be read; None: it lies elsewhere, or this
        engine cannot do that.

        Raises:
            SettingsError: GPUDirect Storage was asked for, and the tensor lies in the CPU's memory.
        """
        if self._settings.transport == "gds":
            if tensor.device.type == "cpu":
                raise _no_gds("these tensors are in the CPU's memory")
            return None
        return device_for(tensor, self._devices, self._running_readers)

    def read(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> None:
        """Carry out a plan and wait for it.

        Args:
            extents: the plan; its files are numbered by ``file_number``.
            owner: keeps the destinations alive.
            device: that holds the destinations, from ``device_of``; None: they are in the CPU's memory.

        Raises:
            CheckpointError: the bytes could not be read; the destinations then hold unspecified bytes.
        """
        if not extents:
            return
        wait_or_cancel(self.submit(extents, owner, device))

    def submit(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> Transfer:
        """Start a plan; arguments and errors are those of ``read``, the errors when it is waited for.

        On a device, the bytes come after what is on the current stream, and are there for any stream once they were
        waited for.
        """
        place = None if device is None else DeviceStream(device, self._devices.stream(device))
        return submit_to(place, self._running_readers(), list(self._open.values()), make_extents(extents), owner)

    def stream(self, infos: Iterable[TensorInfo], report: LoadReport) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, CPU tensor) of ``infos``, in their order, reading ahead (see stream.py).

        Raises:
            SettingsError: GPUDirect Storage was asked for.
        """
        if self._settings.transport == "gds":
            raise _no_gds("these tensors go to the CPU's memory")
        yield from stream_tensors(infos, self._filler_of(report), report)

    def stream_to(
        self, device: torch.device, infos: Iterable[TensorInfo], report: LoadReport
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same with tensors on ``device``; where the engine cannot put bytes there, torch copies them.

        Raises:
            SettingsError: GPUDirect Storage was asked for and cannot be used.
        """
        if self._settings.transport == "gds":
            filler = self._gds_filler(device, report)
            yield from stream_tensors(infos, lambda info: filler, report)
            return
        readers, number = self._running_readers(), self._devices.number(device)
        if number is None or not isinstance(readers, NativeReaders):
            for name, tensor in self.stream(infos, report):
                yield name, tensor.to(device)
            return
        placing = DeviceFiller(
            self._open,
            readers,
            place=lambda: DeviceStream(number, self._devices.stream(number)),
            empty=lambda nbytes: self._devices.empty(nbytes, device),
            buffer_bytes=int(self._settings.device_buffer_bytes),
            block_bytes=int(self._settings.block_bytes),
        )
        try:
            yield from stream_tensors(infos, lambda info: placing, report)
        except TransferError as error:
            raise self.named(error) from error

    def named(self, error: TransferError) -> TransferError:
        """The error of a read with the tensor's name, where one holds the byte."""
        return error_of(self.tensor_at(error.file, error.offset), error)

    def tensor_at(self, file: str | None, offset: int | None) -> str | None:
        """The name of the tensor that holds a byte of a file, for messages."""
        for info in self.files.tensors:
            if info.file == file and offset is not None and info.offset <= offset < info.offset + info.nbytes:
                return info.name
        return None

    def finish(self, report: LoadReport) -> None:
        """Check that no file changed meanwhile, and complete the account.

        Raises:
            CheckpointError: a file is shorter than it was.
        """
        self.files.verify_unchanged()
        complete_report(report, self._source, self._running_readers())

    def close(self) -> None:
        """Cancel what is in flight; give back files and threads. Safe to call twice."""
        with self._lock:
            self._closed = True
            readers, self._readers = self._readers, None
        try:
            if readers is not None:
                readers.close()
        finally:  # Ctrl-C may end the wait for the reader threads
            self.files.close()

    def _filler_of(self, report: LoadReport) -> Callable[[TensorInfo], AnyFiller]:
        """How each file is brought into memory: mapped where it lies in memory anyway, else read into buffers."""
        readers = self._running_readers()
        pooled = PooledFiller(
            self._open,
            readers,
            buffer_bytes=int(self._settings.buffer_bytes),
            block_bytes=int(self._settings.block_bytes),
        )
        if not isinstance(readers, NativeReaders) or self._settings.read_mode not in ("auto", "mapped"):
            return lambda info: pooled
        mapped = MappedFiller(
            self._open, buffer_bytes=int(self._settings.buffer_bytes), count=report.count_bytes_mapped
        )
        always = self._settings.read_mode == "mapped"

        @cache
        def mappable(path: str) -> bool:
            return can_map(self._open[path], always=always)

        def choose(info: TensorInfo) -> AnyFiller:
            return mapped if mappable(info.file) and (always or not mapped.consumer_keeps) else pooled

        return choose

    def _gds_filler(self, device: torch.device, report: LoadReport) -> GdsFiller:
        if device.type != "cuda":
            raise _no_gds(f"these tensors go to {device.type!r}, not to a CUDA device")
        other = next((file for file in self._open.values() if not file.mappable), None)
        if other is not None:
            raise _no_gds(f"it reads local files, and {other.path} is read by {other.source}")
        number = self._devices.index(device)
        obstacle = obstacle_to_gds(number)
        if obstacle is not None:
            raise _no_gds(obstacle)
        return GdsFiller(
            self._open,
            number,
            synchronize=lambda: self._devices.synchronize(number),
            empty=lambda nbytes: self._devices.empty(nbytes, device),
            read_back=self._devices.read_back,
            buffer_bytes=int(self._settings.device_buffer_bytes),
            block_bytes=int(self._settings.block_bytes),
            threads=self._settings.threads,
            count=report.count_bytes_by_gds,
        )

    def _running_readers(self) -> ReaderThreads:
        with self._lock:
            if self._closed:
                raise CheckpointError("the checkpoint is closed")
            if self._readers is None:
                self._readers = make_readers_for(self._open.values(), self._settings)
            return self._readers


def _no_gds(why: str) -> SettingsError:
    return SettingsError(f"transport: gds cannot serve here: {why}; {HINT}")


def no_gds_for_training(path: str) -> SettingsError:
    """The error where a training checkpoint is to be read by GPUDirect Storage."""
    return _no_gds(f"it reads safetensors files, and {path} is a training checkpoint")


def device_for(tensor: torch.Tensor, devices: Devices, readers: Callable[[], ReaderThreads]) -> int | None:
    """The device into whose memory ``engine`` can read a tensor; None: it lies elsewhere, or that cannot do it."""
    number = devices.number_of(tensor)
    return number if number is not None and isinstance(readers(), NativeReaders) else None


def submit_to(
    place: DeviceStream | None, readers: ReaderThreads, files: Sequence[SourceFile], plan: Extents, owner: object
) -> Transfer:
    """Start a plan whose destinations are on a device, from ``device_for``, or in the CPU's memory (None)."""
    if place is None:
        return readers.submit(files, plan, owner=owner)
    assert isinstance(readers, NativeReaders)
    return readers.submit_to_device(files, plan, place, owner=owner)


def error_of(name: str | None, error: TransferError) -> TransferError:
    """The error of a read with the name of its tensor, if that is known."""
    if name is None:
        return error
    named = type(error)(f"tensor {name!r}: {error.message}", file=error.file, offset=error.offset, hint=error.hint)
    named.errno = error.errno
    return named


def complete_report(report: LoadReport, source: str, readers: ReaderThreads) -> None:
    """Put into an account who read, from where, and how much; its clock stops."""
    statistics = readers.statistics()
    report.source, report.engine = source, f"{readers.name} engine, {readers.threads} threads"
    report.modes |= statistics.modes
    report.bytes_read = statistics.bytes_read + statistics.overread_bytes
    report.stop_clock()
