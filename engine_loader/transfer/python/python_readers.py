"""The pure-Python reader threads: where the native ones cannot be built, and for sources without a descriptor.

Its threads need the GIL between reads, so it is slow beside busy Python code; apart from speed it behaves like the
native ones and passes the same tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...errors import CheckpointError, TransferCancelled, TransferError
from ...failures import RETRYABLE, end_of_file, io_error
from ...sources.source import SourceFile
from ..plan import Extents, check_plan
from ..protocol import TransferStatistics
from ..retries import FileTimes, RetryLog
from ..stocked import from_stock
from .python_transfer import CANCEL_GRACE_S, PythonTransfer, Stopped
from .read_tasks import Read, RowsRead

DEFAULT_BLOCK_BYTES = 8 << 20
_LONGEST_PAUSE_S = 2.0
# Rows nearer to each other than this are read with what lies between them and picked out of it.
DEFAULT_GAP_BYTES = 64 << 10


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
        self._retries, self._times = RetryLog(), FileTimes()
        self._closed = False
        self._pid = os.getpid()

    def submit(
        self, files: Sequence[SourceFile], extents: Extents, *, ordered: bool = True, owner: object = None
    ) -> PythonTransfer:
        self.check_process()
        check_plan(extents, files)
        files, extents, bytes_ahead = from_stock(files, extents)
        transfer = PythonTransfer(self, self._changed, files, extents, ordered, owner)
        with self._changed:
            if self._closed:
                raise TransferError("the reader threads are closed")
            self._statistics.bytes_ahead += bytes_ahead
            if transfer.nbytes:
                self._start_workers()
                self._queue.append(transfer)
                self._live.add(transfer)
                self._changed.notify_all()
        return transfer

    def statistics(self) -> TransferStatistics:
        with self._changed:
            return replace(
                self._statistics,
                modes=dict(self._statistics.modes),
                first_retry=self._retries.first,
                slowest_file=self._times.slowest(),
            )

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
        end = time.monotonic() + CANCEL_GRACE_S
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
                if isinstance(read, RowsRead):
                    scratch = self._read_rows(transfer, read, scratch)
                else:
                    self._read(transfer, read)
            except Stopped:
                pass
            except CheckpointError as error:
                failure = error
            except Exception as error:  # a source's own failure must reach the waiter, not end the thread
                failure = TransferError(f"could not read: {error!r}", file=read.file.path, offset=read.offset)
                failure.__cause__ = error
            transfer.task_ended(read, failure)
            # While it waits for the next task, a thread must not keep this one's destinations alive.
            del task, transfer, read, failure

    def _next_task(self) -> tuple[PythonTransfer, Read | RowsRead] | None:
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

    def _read(self, transfer: PythonTransfer, read: Read) -> None:
        buffers = [_memory(address, length) for address, length in zip(read.addresses, read.lengths, strict=True)]
        self._fill(transfer, read, buffers)
        transfer.arrived(read.extents, read.lengths)

    def _read_rows(self, transfer: PythonTransfer, read: RowsRead, scratch: bytearray) -> bytearray:
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

    def _fill(self, transfer: PythonTransfer, read: Read | RowsRead, buffers: list[memoryview]) -> None:
        file, offset, tries = read.file, read.offset, 0
        while buffers:
            transfer.check_going_on()
            began = time.perf_counter()
            try:
                got = file.read_into(offset, buffers)
            except CheckpointError:  # told already; it may be an OSError, too
                raise
            except OSError as error:
                tries += 1
                self._times.add(file.path, time.perf_counter() - began, 0)
                if error.errno not in RETRYABLE or tries >= self.max_tries:
                    raise io_error(file.path, offset, error.errno, tries=tries) from error
                self._count(retries=1)
                self._retries.note(file.path, offset, error.errno)
                transfer.pause(min(_LONGEST_PAUSE_S, self.retry_delay_s * 2 ** (tries - 1)))
                continue
            wanted = sum(map(len, buffers))
            if got == 0:
                raise end_of_file(file.path, offset, file.size)
            tries = 0
            took = time.perf_counter() - began
            self._count(file.source, got, took, short=got < wanted)
            self._times.add(file.path, took, got)
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


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What of ``buffers`` is still empty after ``done`` bytes came."""
    for number, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[number + 1 :]]
        done -= len(buffer)
    return []


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")
