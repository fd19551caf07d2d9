"""Direct mode: the engine's copies are recorded, planned, and carried out straight into the parameters while recording
goes on.

What an engine's ``load_weights`` copies where is known before a byte is read, so only the bytes that this rank keeps
are read, and each goes where it belongs in one pass.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ...errors import CheckpointError, TransferError
from ...formats.safetensors import TensorInfo
from ...report.load import LoadReport
from ...report.progress import Progress
from ...transfer.plan import ExtentRow
from ...transfer.protocol import Transfer
from ..geometry import view_extents
from ..store import TensorStore
from ..targets import overlaps_itself
from .recording import LiveOrigins, Origin, reason, recording_tensor, replace_recording_tensors
from .settling import SettleBeforeRead, SettleBeforeUse
from .small import SmallTensors

_T = TypeVar("_T")

# Not the tensors' own methods, which wait for copies while a load is under way.
_storage_of = torch._C.TensorBase.untyped_storage
_address_of = torch._C.TensorBase.data_ptr

# A batch is handed to the engine's threads when it is worth their while.
_BATCH_BYTES = 32 << 20
_BATCH_EXTENTS = 1024
# Tensors up to this size are read whole (small.py).
SMALL_BYTES = 16 << 10
SMALL = "it is small"
SCATTERED = "its parts do not lie in order"
# Ahead of so many small ones it is worth while to wait for what is pending, and not to look at operations until then.
_LULL_TENSORS = 256
# A copy that scatters into smaller runs than this (a transposed one, say) is left to torch.
_MIN_RUN_BYTES = 64
_MAX_EXTENTS_PER_COPY = 4096
# When this share of the bytes had to be read before they could be copied, recording is no use.
_MATERIALISED_SHARE = 0.25
_MATERIALISED_GRACE_BYTES = 256 << 20


@dataclass(slots=True)
class _Batch:
    """Copies that are handed to the engine's threads together; all from the files of one reader, to one device."""

    number: int
    part: _Part | None = None
    device: int | None = None  # None: CPU memory
    extents: list[ExtentRow] = field(default_factory=list)
    owners: list[object] = field(default_factory=list)
    nbytes: int = 0


@dataclass(slots=True)
class _Storage:
    """Copies into one piece of memory: which bytes, and up to which batch."""

    begins: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)  # begin, end, stride of rows, bytes of a row
    longest: int = 0
    last_batch: int = 0
    opened: bool = False  # somebody looks at it whom we do not see


@dataclass(slots=True)
class _Part:
    """One list of files of the load, and its account."""

    reader: TensorStore
    report: LoadReport
    progress: Progress
    tell: Callable[[str], object]
    offered_bytes: int = 0
    shown_bytes: int = 0


class LoadObserver(Protocol):
    """Is told what a load does with each tensor (see explain.py)."""

    def offered(self, info: TensorInfo) -> None:
        """The engine was given this tensor."""
        ...

    def copied(self, info: TensorInfo, extents: Sequence[ExtentRow]) -> None:
        """A part of it is copied as these extents."""
        ...

    def read(self, info: TensorInfo, nbytes: int, why: str) -> None:
        """So many bytes of it were read as data."""
        ...


class DirectLoad:
    """One load in direct mode: a context manager around the engine's ``load_weights``, at whose end every parameter is
    complete.

    It must be entered before the engine's code runs and left after it: what it does to torch meanwhile (see
    ``SettleBeforeUse``) is a stack that the engine's own contexts lie on.

    Args:
        module: the model; what a loader stored in it as a recording tensor is replaced at the end.
        expects: whether this rank will want a tensor, as far as one can tell; others are not read before the engine
            asks.
        observer: is told what happens.
        execute: False: nothing is copied into the model; only what the engine needs as data is read.

    Attributes:
        recorded_bytes: what was copied without being read first.
        materialised: tensors that were needed as data, with the bytes of each that were read.
        reports: the accounts of the lists of files that the load was made of.
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
        self._observer = observer
        self._execute = execute
        self._expects = expects
        self.reports: list[LoadReport] = []
        self._parts: dict[str, _Part] = {}
        self._batch = _Batch(1)
        self._flying: deque[tuple[_Batch, Transfer]] = deque()
        self._completed = 0
        self._storages: dict[int, _Storage] = {}
        self._live = LiveOrigins()
        self._mode = SettleBeforeUse(self)
        self._mode_is_on = False
        self._modes = ExitStack()
        self._readers = ExitStack()
        self._lock = threading.RLock()
        self._thread = threading.get_ident()
        self._failure: CheckpointError | None = None
        self._small: SmallTensors | None = None
        self._ended = False
        self._recordings = 0
        self.recorded_bytes = 0
        self.materialised: dict[str, int] = {}
        self.materialised_bytes = 0

    def __enter__(self) -> Self:
        self._modes.enter_context(SettleBeforeRead(self))
        self._modes.callback(self._take_mode_off)
        self._put_mode_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._modes.close()
        with self._readers:
            try:
                if error is None:
                    self._complete()
            finally:
                self._ended = True
                self._cancel()

    @property
    def took_nothing(self) -> bool:
        """Whether recording tensors were handed out, and the engine has not looked at any."""
        return bool(self._recordings) and not self.recorded_bytes and not self.materialised_bytes

    def tensors(
        self,
        reader: TensorStore,
        infos: Sequence[TensorInfo],
        report: LoadReport,
        *,
        progress: Progress,
        tell: Callable[[str], object],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, recording tensor) of ``infos``, small ones as real tensors.

        When too much turns out to be needed as data, the rest is streamed.

        Args:
            reader: of the files that hold them; closed when the load ends.
            infos: the tensors.
            report: the account, complete when the load ends.
            progress: is told of bytes that have arrived.
            tell: is given the account's line when the load ends.
        """
        part = _Part(self._readers.enter_context(reader), report, progress, tell)
        self._readers.callback(progress.close)
        self.reports.append(report)
        self._parts.update(dict.fromkeys(reader.paths, part))
        streamed = [info for info in infos if not reader.has_extents(info)]
        infos = [info for info in infos if reader.has_extents(info)]
        small = self._small = self._read_small(part, infos)
        lulls = _lulls([small.has(info) for info in infos])
        for position, info in enumerate(infos):
            self._check_not_ended(info)
            if self._observer is not None:
                self._observer.offered(info)
            if self._materialises_too_much():
                report.note("streamed in the end, for most tensors were needed as data")
                yield from self._stream(part, [*infos[position:], *streamed])
                return
            if position in lulls:
                self._rest()
            tensor = small.take(info)
            if tensor is None:
                if not self._mode_is_on and not self._listen_again():
                    report.note("streamed in the end, for the engine's code has a dispatch mode of its own")
                    yield from self._stream(part, [*infos[position:], *streamed])
                    return
                recording = recording_tensor(info, self)
                self._recordings += 1
                self._live.add(recording.origin)
                yield info.name, recording
                del recording
            else:
                yield info.name, tensor
                del tensor
            report.handed_out(info)
            part.offered_bytes += info.nbytes
        for info in streamed:
            if self._observer is not None:
                self._observer.offered(info)
                self._observer.read(info, info.nbytes, SCATTERED)
        yield from self._stream(part, streamed)

    def _put_mode_on(self) -> None:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        self._mode_is_on = True

    def _take_mode_off(self) -> None:
        # By the stack itself: Ctrl-C may come between a change of it and its note.
        if any(mode is self._mode for mode in _get_current_dispatch_mode_stack()):
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._mode_is_on = False

    def _rest(self) -> None:
        """Have nothing pending, and take the mode off, which makes every operation of the engine's code dearer."""
        if self._is_outermost(1):
            self._submit()
            while self._flying:
                self._wait_for_first()
            self._take_mode_off()

    def _listen_again(self) -> bool:
        """Put the mode back; False where it would lie on one of the engine's, which would then take ours off."""
        if not self._is_outermost(0):
            return False
        self._put_mode_on()
        return True

    def _is_outermost(self, modes: int) -> bool:
        return threading.get_ident() == self._thread and torch._C._len_torch_dispatch_stack() == modes

    # What follows is the CopySink of the recording tensors.

    def copy(self, target: torch.Tensor, origin: Origin, view: torch.Tensor) -> bool:
        """Plan a copy; False where torch must do it on real data."""
        if target.dtype != view.dtype or not _takes_bytes(target):
            return False
        if view.shape != target.shape:
            view = view.expand(target.shape)
        part = self._parts[origin.info.file]
        with self._lock:
            self._check_not_ended(origin.info)
            device = part.reader.device_of(target)
            if device is None and target.device.type != "cpu":
                return False
            extents = self._extents(target, origin, view)
            if extents is None:
                return False
            if extents:
                if self._observer is not None:
                    self._observer.copied(origin.info, extents)
                storage = self._add(part, target, device, extents)
                # Who opened the memory looks at it when he likes; another thread is not seen when it does, and nobody
                # is while the mode is off.
                if storage.opened or threading.get_ident() != self._thread or not self._mode_is_on:
                    self._wait_for_batch(storage.last_batch)
            return True

    def settle(self, tensor: torch.Tensor) -> None:
        """Wait for pending copies into the tensor's memory."""
        with self._lock:
            if not _has_own_memory(tensor):
                self._wait_for_batch(self._batch.number)
                return
            storage = self._storages.get(_storage_of(tensor)._cdata)
            if storage is not None and tensor.numel():
                self._wait_for_batch(storage.last_batch)

    def opened(self, tensor: torch.Tensor) -> None:
        """From now on copy into the tensor's memory at once."""
        if _has_own_memory(tensor):
            with self._lock:
                self._storages.setdefault(_storage_of(tensor)._cdata, _Storage()).opened = True

    def pending(self) -> bool:
        """Whether any copy is pending."""
        return bool(self._flying or self._batch.extents)

    def read(self, origin: Origin, begin: int, nbytes: int) -> torch.Tensor:
        """Read bytes of a tensor now."""
        info = origin.info
        target = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        with self._lock:
            self._check_not_ended(info)
            self.materialised[info.name] = self.materialised.get(info.name, 0) + nbytes
            self.materialised_bytes += nbytes
            if self._observer is not None:
                self._observer.read(info, nbytes, reason.text)
            part = self._parts[info.file]
            part.report.loaded(nbytes)
        if nbytes:
            row = (part.reader.file_number(info), 1, info.offset + begin, nbytes, 0, _address_of(target), 0)
            self._named(part, lambda: part.reader.read([row], target))
        return target

    def _extents(self, target: torch.Tensor, origin: Origin, view: torch.Tensor) -> list[ExtentRow] | None:
        """The copy as extents, or None where that would be many tiny runs."""
        itemsize = view.dtype.itemsize
        number = self._parts[origin.info.file].reader.file_number(origin.info)
        offset = origin.info.offset + int(view.storage_offset()) * itemsize
        if view.is_contiguous() and target.is_contiguous():
            nbytes = view.numel() * itemsize
            return [(number, 1, offset, nbytes, 0, _address_of(target), 0)] if nbytes else []
        sizes = tuple(target.shape)
        if any(stride == 0 and size > 1 for size, stride in zip(sizes, view.stride(), strict=True)):
            return None
        outer = 1
        for size in sizes[:-2]:
            outer *= size
        if outer > _MAX_EXTENTS_PER_COPY:
            return None
        extents = view_extents(
            number,
            offset,
            itemsize,
            sizes,
            src_strides=view.stride(),
            dst_strides=target.stride(),
            address=_address_of(target),
        )
        if extents and extents[0][1] > 1 and extents[0][3] < _MIN_RUN_BYTES:
            return None
        return extents

    def _add(self, part: _Part, target: torch.Tensor, device: int | None, extents: list[ExtentRow]) -> _Storage:
        memory = _storage_of(target)
        storage = self._storages.setdefault(memory._cdata, _Storage())
        if _overlaps(storage, extents):
            # The same memory twice: the later copy wins, so the earlier one comes first.
            self._wait_for_batch(storage.last_batch)
        if self._batch.part is not part or self._batch.device != device:
            self._submit()
            self._batch.part, self._batch.device = part, device
        batch = self._batch
        nbytes = 0
        for extent in extents:
            _note(storage, extent)
            nbytes += extent[1] * extent[3]
        batch.extents += extents
        batch.owners.append(memory)  # not the tensor, which may be given other memory
        batch.nbytes += nbytes
        storage.last_batch = batch.number
        self.recorded_bytes += nbytes
        part.report.loaded(nbytes)
        if batch.nbytes >= _BATCH_BYTES or len(batch.extents) >= _BATCH_EXTENTS:
            self._submit()
        return storage

    def _submit(self) -> None:
        batch = self._batch
        if batch.part is None or not batch.extents:
            return
        self._batch = _Batch(batch.number + 1, batch.part, batch.device)
        if not self._execute:
            self._completed = batch.number
            return
        self._flying.append((batch, self._start(batch, batch.part)))
        while self._flying and self._wait_for_first(timeout_s=0):
            pass

    def _start(self, batch: _Batch, part: _Part) -> Transfer:
        return self._named(part, lambda: part.reader.submit(batch.extents, batch.owners, batch.device))

    def _wait_for_batch(self, number: int) -> None:
        if number == self._batch.number:
            self._submit()
        while self._flying and self._completed < number:
            self._wait_for_first()

    def _wait_for_first(self, timeout_s: float | None = None) -> bool:
        batch, transfer = self._flying[0]
        part = batch.part
        assert part is not None
        if not self._named(part, lambda: transfer.wait(timeout_s=timeout_s)):
            return False
        self._flying.popleft()
        self._completed = batch.number
        # Of what was offered so far this rank may keep a part only; the bar counts what was offered.
        left = sum(flying.nbytes for flying, _ in self._flying if flying.part is part)
        self._show(part, part.offered_bytes - left)
        return True

    def _show(self, part: _Part, nbytes: int) -> None:
        if nbytes > part.shown_bytes:
            part.progress.update(nbytes - part.shown_bytes)
            part.shown_bytes = nbytes

    def _complete(self) -> None:
        if self._failure is not None:
            raise self._failure  # the engine's code went on in spite of it
        self._submit()
        while self._flying:
            self._wait_for_first()
        self._live.make_real()
        replace_recording_tensors(self._module)
        for part in {id(part): part for part in self._parts.values()}.values():
            self._show(part, part.offered_bytes)
            part.reader.finish(part.report)
            part.tell(part.report.line())

    def _check_not_ended(self, info: TensorInfo) -> None:
        if self._ended:
            raise CheckpointError(
                f"tensor {info.name!r} was asked for after the load had ended",
                file=info.file,
                hint="the model keeps its weights for later: set the loader's mode to stream",
            )

    def _cancel(self) -> None:
        if self._small is not None:
            self._small.cancel()
        while self._flying:
            self._flying.pop()[1].cancel()

    def _read_small(self, part: _Part, infos: Iterable[TensorInfo]) -> SmallTensors:
        def submit(window: Sequence[TensorInfo], extents: Sequence[ExtentRow], owner: object) -> Transfer | None:
            if self._observer is not None:
                for info in window:
                    self._observer.read(info, info.nbytes, SMALL)
            part.report.loaded(sum(info.nbytes for info in window))
            return part.reader.submit(extents, owner) if extents else None

        return SmallTensors(
            [info for info in infos if info.nbytes <= SMALL_BYTES and self._expects(info.name)],
            file_number=part.reader.file_number,
            submit=submit,
            wait=lambda transfer: self._named(part, transfer.wait),
        )

    def _stream(self, part: _Part, infos: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        sizes = iter(infos)
        for name, tensor in part.reader.stream(infos, part.report):
            yield name, tensor
            nbytes = next(sizes).nbytes
            part.report.loaded(nbytes)
            part.offered_bytes += nbytes
            self._show(part, part.offered_bytes)

    def _materialises_too_much(self) -> bool:
        materialised = self.materialised_bytes if self._execute else 0
        share = _MATERIALISED_SHARE * (materialised + self.recorded_bytes)
        return materialised > _MATERIALISED_GRACE_BYTES and materialised > share

    def _named(self, part: _Part, work: Callable[[], _T]) -> _T:
        """Name the tensor in an error of a read."""
        try:
            return work()
        except TransferError as error:
            named = part.reader.named(error)
            self._failure = self._failure or named
            if named is error:
                raise
            raise named from error


def _lulls(small: Sequence[bool]) -> frozenset[int]:
    """Where long runs of small tensors begin."""
    found = set()
    for is_small, run in itertools.groupby(range(len(small)), small.__getitem__):
        positions = list(run)
        if is_small and len(positions) >= _LULL_TENSORS:
            found.add(positions[0])
    return frozenset(found)


def _has_own_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what it seems: memory with strides, not a subclass that keeps its data elsewhere."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and tensor.layout == torch.strided


def _takes_bytes(target: torch.Tensor) -> bool:
    """Whether a copy into the tensor is a copy of bytes, each to a place of its own."""
    if not _has_own_memory(target) or target.is_conj() or target.is_neg():
        return False
    return target.is_contiguous() or not overlaps_itself(target)


def _note(storage: _Storage, extent: ExtentRow) -> None:
    _, rows, _, row_bytes, _, address, dst_stride = extent
    end = address + (rows - 1) * dst_stride + row_bytes
    at = bisect.bisect(storage.begins, address)
    storage.begins.insert(at, address)
    storage.spans.insert(at, (address, end, dst_stride if rows > 1 else 0, row_bytes))
    storage.longest = max(storage.longest, end - address)


def _overlaps(storage: _Storage, extents: list[ExtentRow]) -> bool:
    """Whether the extents may write where a recorded copy writes too."""
    for _, rows, _, row_bytes, _, address, dst_stride in extents:
        end = address + (rows - 1) * dst_stride + row_bytes
        at = bisect.bisect_left(storage.begins, end) - 1
        while at >= 0 and storage.begins[at] > address - storage.longest:
            if storage.spans[at][1] > address and not _beside(storage.spans[at], address, rows, row_bytes, dst_stride):
                return True
            at -= 1
    return False


def _beside(span: tuple[int, int, int, int], address: int, rows: int, row_bytes: int, stride: int) -> bool:
    """Whether rows of the same stride lie in columns of their own."""
    begin, _, other_stride, other_bytes = span
    if rows == 1 or stride != other_stride:
        return False
    shift = (address - begin) % stride
    return shift >= other_bytes and shift + row_bytes <= stride
