"""A transfer of the pure-Python reader threads: what has arrived, who waits, how it failed."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ...errors import CheckpointError, TransferCancelled
from ...failures import deadline_passed
from ...sources.source import SourceFile
from ..plan import Extents, plan_bytes
from .read_tasks import Read, RowsRead, cut_tasks

_SLICE_S = 0.2
CANCEL_GRACE_S = 0.5


class Owner(Protocol):
    """What a transfer needs of the PythonReaders that made it."""

    block_bytes: int
    gap_bytes: int
    deadline_s: float
    last_progress: float

    def forked(self) -> bool:
        """Whether this is a child process."""
        ...

    def check_process(self) -> None:
        """Raise TransferError in a child process."""
        ...

    def transfer_ended(self, transfer: PythonTransfer) -> None:
        """Called when nothing will be written for this transfer any more."""
        ...


class Stopped(Exception):
    """The transfer of a task has failed or was cancelled meanwhile."""


class PythonTransfer:
    """A plan being carried out; made by PythonReaders.submit."""

    def __init__(
        self,
        readers: Owner,
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
        self._reading: list[Read | RowsRead] = []
        self._failure: CheckpointError | None = None
        self._submitted = time.monotonic()
        order = np.lexsort((extents["offset"], extents["file"])) if ordered else np.argsort(self._missing)[::-1]
        self._tasks = cut_tasks(files, extents, order.tolist(), readers.block_bytes, readers.gap_bytes)

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
            while not self._is_quiet(CANCEL_GRACE_S):
                self._changed.wait(CANCEL_GRACE_S / 10)

    # What follows is for PythonReaders and its threads; the lock is re-entrant, so all of it may be called holding it.

    def next_task(self) -> Read | RowsRead | None:
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

    def task_ended(self, read: Read | RowsRead, failure: CheckpointError | None) -> None:
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
        """Raise Stopped after a failure, so that a thread ends its read between two system calls."""
        if self._failure is not None:
            raise Stopped

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
