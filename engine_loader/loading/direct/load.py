"""Direct mode: the engine's copies are recorded, planned, and carried out straight into the parameters while recording
goes on.

Where an engine's ``load_weights`` copies each weight is known before a byte is read, so only the bytes that this rank
keeps are read, straight to where they belong.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import torch

from ...errors import CheckpointError, TransferError
from ...formats.safetensors import TensorInfo
from ...report.load_report import LoadReport
from ...report.progress import Progress
from ...transfer.plan import ExtentRow, extent
from ...transfer.protocol import Transfer
from ..store import TensorStore
from .copies import bytes_of, copy_extents, has_own_memory, takes_bytes
from .kept import LiveOrigins, replace_recording_tensors
from .observer import SCATTERED, SMALL, LoadObserver, NoObserver
from .pending import PendingCopies
from .recording import Origin, RecordingTensor, reason, recording_tensor
from .settling import ModeSwitch, SettleBeforeRead
from .small import SmallTensors
from .torch_private import address_of

_T = TypeVar("_T")

# Tensors up to this size are read whole (small.py).
SMALL_BYTES = 16 << 10
# Before so many small tensors in a row it pays to wait for what is pending and to take the dispatch mode off.
_LULL_TENSORS = 256
# When this share of the bytes had to be read before they could be copied, recording is no use.
_MATERIALISED_SHARE = 0.25
_MATERIALISED_GRACE_BYTES = 256 << 20


@dataclass(slots=True)
class _FileSet:
    """The files of one call of ``DirectLoad.tensors``, with their report and progress; the ``BatchFiles`` of their
    copies.

    Attributes:
        failures: the failed reads of the whole load, the first one first.
        offered_bytes: bytes of the tensors that were handed out.
        shown_bytes: of these, what the progress shows.
    """

    reader: TensorStore
    report: LoadReport
    progress: Progress
    log: Callable[[str], object]
    failures: list[TransferError]
    offered_bytes: int = 0
    shown_bytes: int = 0

    def read(self, extents: Sequence[ExtentRow], owner: object) -> None:
        self._naming_tensor(lambda: self.reader.read(extents, owner), waiting=True)

    def submit(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> Transfer:
        return self._naming_tensor(lambda: self.reader.submit(extents, owner, device))

    def wait(self, transfer: Transfer, timeout_s: float | None = None) -> bool:
        return self._naming_tensor(lambda: transfer.wait(timeout_s=timeout_s), waiting=True)

    def show_in_flight(self, nbytes: int) -> None:
        # Of what was offered this rank may keep only a part; the progress counts what was offered.
        self.show(self.offered_bytes - nbytes)

    def show(self, nbytes: int) -> None:
        if nbytes > self.shown_bytes:
            self.progress.update(nbytes - self.shown_bytes)
            self.shown_bytes = nbytes

    def finish(self) -> None:
        self.show(self.offered_bytes)
        self.reader.finish(self.report)
        self.log(self.report.line())

    def _naming_tensor(self, work: Callable[[], _T], *, waiting: bool = False) -> _T:
        """Do ``work``; an error of a read names the tensor. ``waiting``: for the source, which is counted."""
        began = time.perf_counter()
        if waiting:
            self.report.waits_for = "source"
        try:
            return work()
        except TransferError as error:
            named = self.reader.named(error)
            self.failures.append(named)
            if named is error:
                raise
            raise named from error
        finally:
            if waiting:
                self.report.waits_for = "engine"
                self.report.add_wait("source", time.perf_counter() - began)


class DirectLoad:
    """One load in direct mode: a context manager around the engine's ``load_weights``. When it ends, every parameter is
    complete.

    Enter it before the engine's code runs and leave it after that: it puts a dispatch mode on torch's stack (see
    ``SettleBeforeUse``), and the engine's own modes must be above it.

    It is the ``CopySink`` of its recording tensors.

    Args:
        module: the model; recording tensors that its loader stored in it are replaced by real ones at the end.
        expects: called with a tensor's name: False where this rank is known not to want it; such small tensors are not
            read ahead.
        observer: called back about each tensor.
        execute: False: nothing is copied into the model; only what the engine needs as data is read.

    Attributes:
        recorded_bytes: bytes that were copied into parameters without being handed to the engine as data.
        materialised: names of tensors that were needed as data, with the bytes that were read of each.
        materialised_bytes: sum of these.
        reports: one for each call of ``tensors``.

    Raises:
        CheckpointError: (on leaving it) bytes could not be read.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        expects: Callable[[str], bool] = lambda name: True,
        observer: LoadObserver | None = None,
        execute: bool = True,
    ) -> None:
        self._module = module
        self._observer = observer or NoObserver()
        self._execute = execute
        self._expects = expects
        self._file_sets: dict[str, _FileSet] = {}  # by path
        self._readers = ExitStack()
        self._copies = PendingCopies(execute=execute)
        self._small: SmallTensors | None = None
        self._live = LiveOrigins()
        self._mode = ModeSwitch(self)
        self._modes = ExitStack()
        self._lock = threading.RLock()
        self._failures: list[TransferError] = []
        self._ended = False
        self._recordings = 0
        self.recorded_bytes = 0
        self.materialised: dict[str, int] = {}
        self.materialised_bytes = 0
        self.reports: list[LoadReport] = []

    def __enter__(self) -> Self:
        self._modes.enter_context(SettleBeforeRead(self))
        self._modes.callback(self._mode.take_off)
        self._mode.put_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._readers:  # closed also where Ctrl-C comes while the modes end
            try:
                self._modes.close()
                if error is None:
                    self._complete()
            finally:
                self._ended = True
                if self._small is not None:
                    self._small.cancel()
                self._copies.cancel()

    @property
    def took_nothing(self) -> bool:
        """Whether recording tensors were handed out and the engine used none of them."""
        return bool(self._recordings) and not self.recorded_bytes and not self.materialised_bytes

    def tensors(
        self,
        reader: TensorStore,
        infos: Sequence[TensorInfo],
        report: LoadReport,
        *,
        progress: Progress,
        log: Callable[[str], object],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, recording tensor) of ``infos``; for small ones (name, tensor with data).

        When too much turns out to be needed as data, the rest is streamed.

        Args:
            reader: of the files that hold the tensors; closed when the load ends.
            infos: the tensors.
            report: counts what is read; complete when the load ends.
            progress: counts bytes of tensors that have been loaded; closed when the load ends.
            log: called with the report's line when the load ends.

        Raises:
            CheckpointError: bytes could not be read, or a tensor was asked for after the load had ended.
        """
        files = _FileSet(self._readers.enter_context(reader), report, progress, log, self._failures)
        self._readers.callback(progress.close)
        self.reports.append(report)
        self._file_sets.update(dict.fromkeys(reader.paths, files))
        in_order: list[TensorInfo] = []
        scattered: list[TensorInfo] = []
        for info in infos:
            (in_order if reader.has_extents(info) else scattered).append(info)
        left = yield from self._hand_out(files, in_order)
        if not left:
            for info in scattered:
                self._observer.on_tensor(info)
                self._observer.on_read(info, info.nbytes, SCATTERED)
        yield from self._stream(files, [*left, *scattered])

    def _hand_out(
        self, files: _FileSet, infos: Sequence[TensorInfo]
    ) -> Generator[tuple[str, torch.Tensor], None, Sequence[TensorInfo]]:
        """Yield (name, tensor) in direct mode; returns the tensors that remain to be streamed."""
        small = self._small = self._read_small(files, infos)
        lulls = _lulls([small.has(info) for info in infos])
        for position, info in enumerate(infos):
            self._check_not_ended(info)
            self._observer.on_tensor(info)
            if self._materialises_too_much():
                files.report.add_note("streamed in the end, for most tensors were needed as data")
                return infos[position:]
            if position in lulls and self._mode.is_alone():
                # The mode makes every operation of the engine's code slower. Nothing is pending, nothing to see.
                self._copies.complete()
                self._mode.take_off()
            # No variable of this function holds on to a tensor.
            if small.has(info):
                yield info.name, small.take(info)
            elif self._mode.is_on or self._mode.put_on_alone():
                yield info.name, self._recording(info)
            else:
                files.report.add_note("streamed in the end, for the engine's code has a dispatch mode of its own")
                return infos[position:]
            files.report.count_tensor(info)
            files.offered_bytes += info.nbytes
        return ()

    def _recording(self, info: TensorInfo) -> RecordingTensor:
        recording = recording_tensor(info, self)
        self._recordings += 1
        self._live.add(recording.origin)
        return recording

    def _read_small(self, files: _FileSet, infos: Iterable[TensorInfo]) -> SmallTensors:
        def submit(batch: Sequence[TensorInfo], extents: Sequence[ExtentRow], owner: object) -> Transfer | None:
            for info in batch:
                self._observer.on_read(info, info.nbytes, SMALL)
            files.report.count_bytes_kept(sum(info.nbytes for info in batch))
            return files.submit(extents, owner) if extents else None

        return SmallTensors(
            [info for info in infos if info.nbytes <= SMALL_BYTES and self._expects(info.name)],
            file_number=files.reader.file_number,
            submit=submit,
            wait=files.wait,
        )

    def _stream(self, files: _FileSet, infos: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        sizes = iter(infos)
        for name, tensor in files.reader.stream(infos, files.report):
            yield name, tensor
            nbytes = next(sizes).nbytes
            files.report.count_bytes_kept(nbytes)
            files.offered_bytes += nbytes
            files.show(files.offered_bytes)

    def _materialises_too_much(self) -> bool:
        materialised = self.materialised_bytes if self._execute else 0
        share = _MATERIALISED_SHARE * (materialised + self.recorded_bytes)
        return materialised > _MATERIALISED_GRACE_BYTES and materialised > share

    def copy(self, target: torch.Tensor, origin: Origin, view: torch.Tensor) -> bool:
        """Plan a copy; False where torch must do it on real data."""
        if target.dtype != view.dtype or not takes_bytes(target):
            return False
        if view.shape != target.shape:
            view = view.expand(target.shape)
        info = origin.info
        files = self._file_sets[info.file]
        with self._lock:
            self._check_not_ended(info)
            device = files.reader.device_of(target)
            if device is None and target.device.type != "cpu":
                return False
            extents = copy_extents(files.reader.file_number(info), info.offset, view, target)
            if extents is None:
                return False
            if extents:
                self._observer.on_copy(info, extents)
                nbytes = bytes_of(extents)
                self.recorded_bytes += nbytes
                files.report.count_bytes_kept(nbytes)
                memory = self._copies.add(files, target, device, extents, nbytes)
                # Code that the mode does not see may read the memory at any time.
                if memory.exposed or not self._mode.sees_caller():
                    self._copies.wait_for(memory)
            return True

    def settle(self, tensor: torch.Tensor) -> None:
        """Wait for the pending copies into the tensor's memory; for all where it is not known where that is."""
        with self._lock:
            self._copies.settle(tensor)

    def expose(self, tensor: torch.Tensor) -> None:
        """From now on copy into the tensor's memory synchronously: it was exposed past the dispatcher."""
        if has_own_memory(tensor):
            with self._lock:
                self._copies.expose(tensor)

    def settle_everything(self) -> None:
        """Wait for all pending copies: another process may be told that they are there."""
        with self._lock:
            self._copies.complete()

    def pending(self) -> bool:
        """Whether any copy is pending."""
        return self._copies.any()

    def read(self, origin: Origin, begin: int, nbytes: int) -> torch.Tensor:
        """Read ``nbytes`` bytes of a tensor from its byte ``begin`` on, now; returns them as uint8.

        Raises:
            CheckpointError: they could not be read, or the load has ended.
        """
        info = origin.info
        target = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        with self._lock:
            self._check_not_ended(info)
            self.materialised[info.name] = self.materialised.get(info.name, 0) + nbytes
            self.materialised_bytes += nbytes
            self._observer.on_read(info, nbytes, reason.text)
            files = self._file_sets[info.file]
            files.report.count_bytes_kept(nbytes)
        if nbytes:
            row = extent(files.reader.file_number(info), info.offset + begin, nbytes, address_of(target))
            files.read([row], target)
        return target

    def _complete(self) -> None:
        if self._failures:
            raise self._failures[0]  # the engine's code caught it and went on
        self._copies.complete()
        self._live.make_real()
        replace_recording_tensors(self._module)
        for files in {id(files): files for files in self._file_sets.values()}.values():
            files.finish()

    def _check_not_ended(self, info: TensorInfo) -> None:
        if self._ended:
            raise CheckpointError(
                f"tensor {info.name!r} was asked for after the load had ended",
                file=info.file,
                hint="the model keeps its weights for later: set the loader's mode to stream",
            )


def _lulls(small: Sequence[bool]) -> frozenset[int]:
    """Positions where long runs of small tensors begin."""
    found = set()
    for is_small, run in itertools.groupby(range(len(small)), small.__getitem__):
        positions = list(run)
        if is_small and len(positions) >= _LULL_TENSORS:
            found.add(positions[0])
    return frozenset(found)
