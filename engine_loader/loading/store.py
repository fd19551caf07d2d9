"""A store of tensors: what ``Checkpoint``, direct mode and streams read through, whatever the layout of the files.

There are two: safetensors files (safetensors_store.py) and training checkpoints (training/store.py). Extents (see
transfer/plan.py) name bytes of a tensor by ``file_number`` and by the offset in its located
``TensorInfo`` (see ``located``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, Self

import torch

from ..errors import CheckpointError, TransferError
from ..formats.safetensors import TensorInfo
from ..report.load_report import LoadReport
from ..sources.source import SourceFile
from ..transfer.device_stream import DeviceStream
from ..transfer.native.native_readers import NativeReaders
from ..transfer.plan import ExtentRow, Extents
from ..transfer.protocol import ReaderThreads, Transfer, wait_or_cancel
from .devices.cuda import Devices
from .devices.per_tensor import TargetDevice


class TensorStore(Protocol):
    """The tensors of an open checkpoint. May be used from several threads; owns its files and closes them.

    Attributes:
        listing: the path of the file that lists the tensors, or of the first of several, for messages.
        paths: the files that ``infos`` name.
        streams_to_devices: whether ``stream`` can put tensors on a device in another way than by torch's copies.
        key_mapping_applies: whether names went through the setting ``key_mapping``.
        lacking: name -> error of the tensors that the index lists and no file has; known after ``by_name``.
        ranges: called for path -> (offset, length) of where in the file tensors lie; files that are not in it hold
            little else.
        left_out: what of a training checkpoint is not served, in a few words; "" for nothing.
    """

    listing: str
    paths: Sequence[str]
    streams_to_devices: bool
    key_mapping_applies: bool
    lacking: Mapping[str, CheckpointError] = MappingProxyType({})
    ranges: Callable[[], Mapping[str, Sequence[tuple[int, int]]]] = dict
    left_out: str = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def infos(self) -> Sequence[TensorInfo]:
        """Every tensor of every file, in file order, located (see ``located``)."""
        ...

    def by_name(self) -> dict[str, TensorInfo]:
        """The tensors to be served, by name, in file order.

        Raises:
            CheckpointError: two have one name, or the index puts one into a file and another has it.
        """
        ...

    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of all files together; where two differ, the first file's entry counts."""
        ...

    def other_items(self) -> dict[str, Callable[[], bytes]]:
        """What a training saved beside tensors, by its name: how its bytes are read, as ``torch.save`` wrote them."""
        return {}

    def state_paths(self) -> Mapping[str, tuple[Any, ...]]:
        """The keys under which each item was in a training's nested state dict, by its name there."""
        return {}

    def located(self, infos: Sequence[TensorInfo]) -> Sequence[TensorInfo]:
        """``infos`` with the file and the offset of each tensor's first element, which may take reads.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        ...

    def dtype_and_shape(self, info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
        """Element type and shape of the torch tensor that it becomes.

        Raises:
            CheckpointError: torch has no tensor like it.
        """
        ...

    def has_extents(self, info: TensorInfo) -> bool:
        """Whether parts of a tensor can be asked for as extents; others can only be streamed."""
        ...

    def file_number(self, info: TensorInfo) -> int:
        """The number of a tensor's file in the extents that ``read`` takes."""
        ...

    def device_of(self, tensor: torch.Tensor) -> int | None:
        """The number of the device into whose memory ``read`` can put a tensor; None: the CPU's, or ``read`` cannot.

        Raises:
            SettingsError: GPUDirect Storage was asked for, and the tensor lies in the CPU's memory.
        """
        ...

    def staging(self, target: torch.Tensor) -> torch.device:
        """The device to stream to for a target that ``read`` cannot fill."""
        ...

    def read(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> None:
        """Carry out a plan and wait for it.

        Args:
            extents: the plan; its files are numbered by ``file_number``.
            owner: keeps the destinations alive.
            device: that holds the destinations, from ``device_of``; None: they are in the CPU's memory.

        Raises:
            CheckpointError: the bytes could not be read; the destinations then hold unspecified bytes.
        """
        if extents:
            wait_or_cancel(self.submit(extents, owner, device))

    def submit(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> Transfer:
        """Start a plan; arguments and errors are those of ``read``, the errors when it is waited for.

        On a device, the bytes come after what is on the current stream, and are there for any stream once they were
        waited for.
        """
        ...

    def stream(
        self, infos: Iterable[TensorInfo], report: LoadReport, device: TargetDevice = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of ``infos``, in their order, reading ahead.

        Args:
            infos: the tensors.
            report: counts what was handed out.
            device: where tensors are put; None: into the CPU's memory.

        Raises:
            CheckpointError: the bytes could not be read.
            SettingsError: GPUDirect Storage was asked for and cannot be used.
        """
        ...

    def named(self, error: TransferError) -> TransferError:
        """The error of a read, with the name of the tensor that holds its byte, where one does."""
        name = self.tensor_at(error.file, error.offset)
        if name is None:
            return error
        named = type(error)(f"tensor {name!r}: {error.message}", file=error.file, offset=error.offset, hint=error.hint)
        named.errno = error.errno
        return named

    def tensor_at(self, file: str | None, offset: int | None) -> str | None:
        """The name of the tensor that holds a byte of a file, for messages."""
        ...

    def finish(self, report: LoadReport) -> None:
        """Check that no file changed meanwhile, and complete the account.

        Raises:
            CheckpointError: a file is shorter than it was.
        """
        ...

    def close(self) -> None:
        """Cancel what is in flight; give back files and threads. Safe to call twice."""
        ...


def device_for(tensor: torch.Tensor, devices: Devices, readers: Callable[[], ReaderThreads]) -> int | None:
    """The device into whose memory the running threads can read a tensor; None: it lies elsewhere, or they cannot."""
    number = devices.number_of(tensor)
    return number if number is not None and isinstance(readers(), NativeReaders) else None


def submit_to(
    stream: DeviceStream | None, readers: ReaderThreads, files: Sequence[SourceFile], plan: Extents, owner: object
) -> Transfer:
    """Start a plan whose destinations are on a device, from ``device_for``, or in the CPU's memory (None)."""
    if stream is None:
        return readers.submit(files, plan, owner=owner)
    assert isinstance(readers, NativeReaders)
    return readers.submit_to_device(files, plan, stream, owner=owner)


def complete_report(report: LoadReport, source: str, readers: ReaderThreads) -> None:
    """Put into an account who read, from where, and how much; its clock stops."""
    statistics = readers.statistics()
    report.source, report.engine = source, f"{readers.name} engine, {readers.threads} threads"
    report.modes |= statistics.modes
    report.bytes_read = statistics.bytes_read + statistics.overread_bytes
    report.bytes_ahead = statistics.bytes_ahead
    report.read_seconds = statistics.read_seconds
    report.retries, report.first_retry = statistics.retries, statistics.first_retry
    report.slowest_file = statistics.slowest_file
    report.stop_clock()
