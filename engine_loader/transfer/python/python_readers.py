"""The pure-Python reader threads: where the native ones cannot be built, and for sources without a descriptor.

Its threads need the GIL between reads, so it is slow beside busy Python code; apart from speed it behaves like the
native ones and passes the same tests.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import CheckpointError, TransferCancelled, TransferError
from ...failures import RETRYABLE, deadline_passed, end_of_file, io_error
from ...sources.source import SourceFile
from ..plan import Extents, check_plan, plan_bytes
from ..protocol import TransferStatistics

DEFAULT_BLOCK_BYTES = 8 << 20
MAX_SCATTER = 512
"""Destinations of one read; the kernel takes at most 1024."""
_SLICE_S = 0.2
_CANCEL_GRACE_S = 0.5
_LONGEST_PAUSE_S = 2.0
# Rows nearer to each other than this are read with what lies between them and picked out of it.
DEFAULT_GAP_BYTES = 64 << 10


@dataclass(slots=True, eq=False)
class _Read:
    """One task of a thread: consecutive bytes of a file into one or several places.

    ``since`` is when it began or last got bytes.
    """

    file: SourceFile
    offset: int
    extents: list[int]
    addresses: list[int]
    lengths: list[int]
    since: float = 0.0


@dataclass(slots=True, eq=False)
class _RowsRead:
    """One task of a thread: a span of a file of which rows are kept."""

    file: SourceFile
    offset: int
    extent: int
    rows: int
    row_bytes: int
    src_stride: int
    address: int
    dst_stride: int
    since: float = 0.0


class _Stopped(Exception):
    """The transfer of a task has failed or was cancelled meanwhile."""


class PythonReaders:
    """Threads that read by ``SourceFile.read_into``.

    Args:
        threads: how many read at once.
        block_bytes: the largest single read.
        max_tries: how often a read is tried when its error may pass.
        retry_delay_s: the wait before the second try; it doubles with every further one, up to 2 s.
        deadline_s: when a read gets no byte for this long, its transfer fails.
        gap_bytes: rows that are no further apart are read with what lies between them.
    """

    name = "python"

    def __init__(
        self,
        threads: int | None = None,
        *,
        block_bytes: int = DEFAULT_BLOCK_BYTES,
        max_tries: int = 5,
        retry_delay_s: float = 0.05,
        deadline_s: float = 120.0,
        gap_bytes: int = DEFAULT_GAP_BYTES,
    ) -> None:
        self.threads = threads or min(8, len(os.sched_getaffinity(0)) * 2)
        self.block_bytes = block_bytes
        self.max_tries = max_tries
        self.retry_delay_s = retry_delay_s
        self.deadline_s = deadline_s
        self.gap_bytes = gap_bytes
        self.last_progress = time.monotonic()
        self._changed = threading.Condition()
        self._queue: deque[PythonTransfer] = deque()
        self._live: set[PythonTransfer] = set()
        self._workers: list[threading.Thread] = []
        self._statistics = TransferStatistics()
        self._closed = False
        self._pid = os.getpid()

    def submit(
        self, files: Sequence[SourceFile], extents: Extents, *, ordered: bool = True, owner: object = None
    ) -> PythonTransfer:
        self.check_process()
        check_plan(extents, files)
        transfer = PythonTransfer(self, self._changed, files, extents, ordered, owner)
        with self._changed:
            if self._closed:
                raise TransferError("the reader threads are closed")
            if transfer.nbytes:
                self._start_workers()
                self._queue.append(transfer)
                self._live.add(transfer)
                self._changed.notify_all()
        return transfer

    def statistics(self) -> TransferStatistics:
        with self._changed:
            return TransferStatistics(**{**vars(self._statistics), "modes": dict(self._statistics.modes)})

    def close(self) -> None:
        if self.forked():
            return
        with self._changed:
            self._closed = True
            for transfer in list(self._live):
                transfer.fail(TransferCancelled("the reader threads were closed"))
            self._changed.notify_all()
            workers, self._workers = self._workers, []
        # A thread that hangs in the kernel is left behind; it ends when its read comes back.
        end = time.monotonic() + _CANCEL_GRACE_S
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))

    def forked(self) -> bool:
        """Whether this is a child process: threads do not survive a fork, and a lock may be held for ever."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise TransferError in a child process."""
        if self.forked():
            raise TransferError("reader threads do not survive a fork", hint="open the checkpoint again here")

    def transfer_ended(self, transfer: PythonTransfer) -> None:
        """Forget a transfer that will not write any more (called with the lock held)."""
        self._live.discard(transfer)
        with contextlib.suppress(ValueError):
            self._queue.remove(transfer)

    def _start_workers(self) -> None:
        while len(self._workers) < self.threads:
            worker = threading.Thread(target=self._work, name="engine-loader-read", daemon=True)
            try:
                worker.start()
            except RuntimeError as error:
                if not self._workers:
                    raise TransferError(f"no thread could be started: {error}", hint="raise the pids limit") from error
                return
            self._workers.append(worker)

    def _work(self) -> None:
        scratch = bytearray()
        while (task := self._next_task()) is not None:
            transfer, read = task
            failure: CheckpointError | None = None
            try:
                if isinstance(read, _RowsRead):
                    scratch = self._read_rows(transfer, read, scratch)
                else:
                    self._read(transfer, read)
            except _Stopped:
                pass
            except CheckpointError as error:
                failure = error
            except Exception as error:  # a source's own failure must reach the waiter, not end the thread
                failure = TransferError(f"could not read: {error!r}", file=read.file.path, offset=read.offset)
                failure.__cause__ = error
            transfer.task_ended(read, failure)
            # While it waits for the next task, a thread must not keep this one's destinations alive.
            del task, transfer, read, failure

    def _next_task(self) -> tuple[PythonTransfer, _Read | _RowsRead] | None:
        """Wait for something to read; None when the reader threads are closed."""
        with self._changed:
            while not self._closed:
                while self._queue:
                    transfer = self._queue[0]
                    if (read := transfer.next_task()) is not None:
                        return transfer, read
                    self._queue.popleft()
                    del transfer
                self._changed.wait()
        return None

    def _read(self, transfer: PythonTransfer, read: _Read) -> None:
        buffers = [_memory(address, length) for address, length in zip(read.addresses, read.lengths, strict=True)]
        self._fill(transfer, read, buffers)
        transfer.arrived(read.extents, read.lengths)

    def _read_rows(self, transfer: PythonTransfer, read: _RowsRead, scratch: bytearray) -> bytearray:
        span = (read.rows - 1) * read.src_stride + read.row_bytes
        if len(scratch) < span:
            scratch = bytearray(max(span, self.block_bytes))
        self._fill(transfer, read, [memoryview(scratch)[:span]])
        shape = (read.rows, read.row_bytes)
        dst_span = (read.rows - 1) * read.dst_stride + read.row_bytes
        source = np.ndarray(shape, np.uint8, scratch, 0, (read.src_stride, 1))
        target = np.ndarray(shape, np.uint8, _memory(read.address, dst_span), 0, (read.dst_stride, 1))
        np.copyto(target, source)
        transfer.arrived([read.extent], [read.rows * read.row_bytes])
        return scratch

    def _fill(self, transfer: PythonTransfer, read: _Read | _RowsRead, buffers: list[memoryview]) -> None:
        file, offset, tries = read.file, read.offset, 0
        while buffers:
            transfer.check_going_on()
            began = time.perf_counter()
            try:
                got = file.read_into(offset, buffers)
            except OSError as error:
                tries += 1
                if error.errno not in RETRYABLE or tries >= self.max_tries:
                    raise io_error(file.path, offset, error.errno, tries=tries) from error
                self._count(retries=1)
                transfer.pause(min(_LONGEST_PAUSE_S, self.retry_delay_s * 2 ** (tries - 1)))
                continue
            wanted = sum(map(len, buffers))
            if got == 0:
                raise end_of_file(file.path, offset, file.size)
            tries = 0
            self._count(file.source, got, time.perf_counter() - began, short=got < wanted)
            read.since = self.last_progress = time.monotonic()
            offset += got
            buffers = _rest(buffers, got)

    def _count(
        self, mode: str = "", nbytes: int = 0, seconds: float = 0.0, *, short: bool = False, retries: int = 0
    ) -> None:
        with self._changed:
            statistics = self._statistics
            statistics.retries += retries
            if mode:
                statistics.reads += 1
                statistics.bytes_read += nbytes
                statistics.read_seconds += seconds
                statistics.short_reads += short
                statistics.modes[mode] = statistics.modes.get(mode, 0) + nbytes


class PythonTransfer:
    """A plan being carried out; made by PythonReaders.submit."""

    def __init__(
        self,
        readers: PythonReaders,
        changed: threading.Condition,
        files: Sequence[SourceFile],
        extents: Extents,
        ordered: bool,
        owner: object,
    ) -> None:
        self.nbytes = plan_bytes(extents)
        self._readers = readers
        self._changed = changed
        self._files = files
        self._owner: object = owner
        # Bytes missing per extent; an extent is complete at zero.
        self._missing = (extents["rows"].astype(np.int64) * extents["row_bytes"].astype(np.int64)).tolist()
        self._bytes_done = 0
        self._reading: list[_Read | _RowsRead] = []
        self._failure: CheckpointError | None = None
        self._submitted = time.monotonic()
        order = np.lexsort((extents["offset"], extents["file"])) if ordered else np.argsort(self._missing)[::-1]
        self._tasks = _tasks(files, extents, order.tolist(), readers.block_bytes, readers.gap_bytes)

    @property
    def bytes_done(self) -> int:
        return self._bytes_done

    def wait(self, extent: int | None = None, timeout_s: float | None = None) -> bool:
        self._readers.check_process()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._complete(extent):
                self._check_deadline()
                if self._failure is not None and self._is_quiet(self._readers.deadline_s):
                    # Each waiter gets an exception of its own: raising one collects tracebacks in it.
                    raise copy.copy(self._failure) from self._failure.__cause__
                left = _SLICE_S if end is None else min(_SLICE_S, end - time.monotonic())
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def cancel(self) -> None:
        if self._readers.forked():
            return
        with self._changed:
            self.fail(TransferCancelled("the transfer was cancelled"))
            while not self._is_quiet(_CANCEL_GRACE_S):
                self._changed.wait(_CANCEL_GRACE_S / 10)

    # What follows is for PythonReaders and its threads; the lock is re-entrant, so all of it may be called holding it.

    def next_task(self) -> _Read | _RowsRead | None:
        """The next read, or None when there is none left to start."""
        read = None if self._failure is not None else next(self._tasks, None)
        if read is not None:
            read.since = self._readers.last_progress = time.monotonic()
            self._reading.append(read)
        return read

    def arrived(self, extents: Sequence[int], lengths: Sequence[int]) -> None:
        """Book bytes that have reached their destinations."""
        with self._changed:
            for extent, length in zip(extents, lengths, strict=True):
                self._missing[extent] -= length
            self._bytes_done += sum(lengths)

    def task_ended(self, read: _Read | _RowsRead, failure: CheckpointError | None) -> None:
        """Book a read that will write no more; with the first ``failure`` the transfer fails."""
        with self._changed:
            self._reading.remove(read)
            if failure is not None:
                self.fail(failure)
            self._forget_if_over()
            self._changed.notify_all()

    def fail(self, error: CheckpointError) -> None:
        """Stop, and let waiters raise ``error``; a transfer that is complete or has failed stays as it is."""
        with self._changed:
            if self._failure is None and self._bytes_done < self.nbytes:
                self._failure = error
                self._forget_if_over()
                self._changed.notify_all()

    def check_going_on(self) -> None:
        """Raise _Stopped after a failure, so that a thread ends its read between two system calls."""
        if self._failure is not None:
            raise _Stopped

    def pause(self, seconds: float) -> None:
        """Sleep before another try, but not through a cancellation."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, seconds)

    def _forget_if_over(self) -> None:
        if not self._reading and (self._failure is not None or self._bytes_done == self.nbytes):
            self._owner = None
            self._tasks = iter(())
            self._readers.transfer_ended(self)

    def _complete(self, extent: int | None) -> bool:
        return self._bytes_done == self.nbytes if extent is None else bool(self._missing[extent] == 0)

    def _check_deadline(self) -> None:
        if self._failure is not None:
            return
        seconds = self._readers.deadline_s
        late = time.monotonic() - seconds
        stuck = next((read for read in self._reading if read.since < late), None)
        if stuck is not None:
            self.fail(deadline_passed(stuck.file.path, stuck.offset, seconds))
        elif not self._reading and max(self._submitted, self._readers.last_progress) < late:
            # Every thread hangs in reads of other transfers.
            self.fail(deadline_passed(self._files[0].path, 0, seconds))

    def _is_quiet(self, grace_s: float) -> bool:
        """Whether no thread will write any more; reads without a byte for ``grace_s`` are given up.

        A read that comes back after all writes into memory that its thread keeps alive by way of ``_owner``.
        """
        late = time.monotonic() - grace_s
        return all(read.since < late for read in self._reading)


def _tasks(
    files: Sequence[SourceFile], extents: Extents, order: list[int], block_bytes: int, gap_bytes: int
) -> Iterator[_Read | _RowsRead]:
    """Cut large extents and merge neighbours, in the given order."""
    pending: _Read | None = None
    for index in order:
        number, rows, offset, row_bytes, src_stride, address, dst_stride = extents[index].item()
        file = files[number]
        if rows * row_bytes == 0:
            continue
        if rows > 1 and not (src_stride == dst_stride == row_bytes):
            if pending is not None:
                yield pending
                pending = None
            whole = _RowsRead(file, offset, index, rows, row_bytes, src_stride, address, dst_stride)
            yield from _row_tasks(whole, block_bytes, gap_bytes)
            continue
        for start in range(0, rows * row_bytes, block_bytes):
            length = min(block_bytes, rows * row_bytes - start)
            if pending is not None and _joins(pending, file, offset + start, length, block_bytes):
                pending.extents.append(index)
                pending.addresses.append(address + start)
                pending.lengths.append(length)
                continue
            if pending is not None:
                yield pending
            pending = _Read(file, offset + start, [index], [address + start], [length])
    if pending is not None:
        yield pending


def _joins(pending: _Read, file: SourceFile, offset: int, length: int, block_bytes: int) -> bool:
    held = sum(pending.lengths)
    return (
        pending.file is file
        and pending.offset + held == offset
        and held + length <= block_bytes
        and len(pending.lengths) < MAX_SCATTER
    )


def _row_tasks(read: _RowsRead, block_bytes: int, gap_bytes: int) -> Iterator[_Read | _RowsRead]:
    # The stride is smaller than a row where rows overlap, and zero where one row is wanted many times.
    pitch = max(read.src_stride, read.row_bytes)
    dense = pitch - read.row_bytes <= gap_bytes and pitch <= block_bytes
    step = block_bytes // pitch if dense else 1
    for row in range(0, read.rows, step):
        rows = min(step, read.rows - row)
        offset, address = read.offset + row * read.src_stride, read.address + row * read.dst_stride
        if rows > 1:
            yield dataclasses.replace(read, offset=offset, rows=rows, address=address)
            continue
        for start in range(0, read.row_bytes, block_bytes):
            length = min(block_bytes, read.row_bytes - start)
            yield _Read(read.file, offset + start, [read.extent], [address + start], [length])


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What of ``buffers`` is still empty after ``done`` bytes came."""
    for number, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[number + 1 :]]
        done -= len(buffer)
    return []


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")
