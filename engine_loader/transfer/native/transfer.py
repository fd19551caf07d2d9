"""A transfer of the native reader threads: waiting for it, cancelling it, and telling how it failed."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import TransferCancelled, TransferError
from ...failures import deadline_passed, end_of_file, io_error
from ...sources.source import SourceFile
from ..retries import FileTimes, RetryLog
from .device_errors import copy_error, copy_overdue
from .library import (
    E_CLOSED,
    E_FORKED,
    E_MEMORY,
    E_THREAD,
    FAIL_CANCELLED,
    FAIL_DEADLINE,
    FAIL_DEVICE,
    FAIL_EOF,
    FAILED,
    OK,
    TIMEOUT,
    Failure,
    load_library,
    load_quick,
)
from .usrbio_errors import deadline_of, usrbio_error

SLICE_MS = 200
"""Calls wait no longer than this at a time, so that Ctrl-C is noticed."""
CANCEL_GRACE_S = 0.5

stuck: set[NativeTransfer] = set()
"""Transfers given up with a read that never came back from the kernel. They own memory that it may still write to."""


class Owner(Protocol):
    """What a transfer needs of the NativeReaders that made it."""

    deadline_s: float
    retries: RetryLog
    times: FileTimes

    def device_error(self, device: int, code: int) -> str:
        """What the runtime says to one of its errors."""
        ...

    def transfer_ended(self, transfer: NativeTransfer) -> None:
        """Called when nothing will be written for this transfer any more."""
        ...


class NativeTransfer:
    """A plan being carried out; made by NativeReaders.

    Args:
        readers: kept as long as the transfer is.
        handle: of the library; the transfer gives it back.
        files: what ``file`` numbers in failures refer to.
        owner: see ReaderThreads.submit.
        device: the library's number of the device that holds the destinations, if one does.
    """

    def __init__(
        self,
        readers: Owner,
        handle: ctypes.c_void_p,
        nbytes: int,
        files: Sequence[SourceFile],
        owner: object,
        *,
        device: int | None = None,
    ) -> None:
        self.nbytes = nbytes
        self._readers = readers
        self._library = load_library()
        self._quick = load_quick()
        self._handle = handle
        self._files = files
        self._owner: object = owner
        self._device = device
        self._complete = False
        self._forgotten = False

    def wait(self, extent: int | None = None, timeout_s: float | None = None) -> bool:
        if self._complete:
            return True
        if extent is not None and extent < 0:
            raise IndexError(f"there is no extent {extent}")
        which = -1 if extent is None else extent
        result = self._wait(which, timeout_s)
        if result == FAILED:
            raise self._failure()
        if result == TIMEOUT:
            return False
        if result != OK:
            raise call_error(result)
        if extent is None or self.bytes_done == self.nbytes:
            self._complete = True
            self._forget()
        return True

    @property
    def bytes_done(self) -> int:
        return self.nbytes if self._complete else int(self._quick.el_bytes_done(self._handle))

    def completed(self, start: int = 0) -> npt.NDArray[np.uint32]:
        """Numbers of the extents that are complete, in order of completion, without the first ``start`` of them."""
        count = self._quick.el_completed(self._handle, start, None, 0)
        found = np.empty(max(0, count - start), np.uint32)
        self._quick.el_completed(self._handle, start, found.ctypes.data, len(found))
        return found

    def cancel(self) -> None:
        end = time.monotonic() + CANCEL_GRACE_S
        while self._library.el_cancel(self._handle, SLICE_MS) == TIMEOUT:
            if time.monotonic() >= end:
                # A read hangs in the kernel. Its thread may yet write to the destinations, so they live on.
                stuck.add(self)
                return
        self._forget()

    def forget_if_quiet(self) -> None:
        """Give up the owner of the destinations if nothing will be written to them any more."""
        result = self._quick.el_wait(self._handle, -1, 0)
        if result == OK or (result == FAILED and self._info().in_flight == 0):
            self._forget()

    def __del__(self) -> None:
        self._quick.el_release(self._handle)

    def _wait(self, which: int, timeout_s: float | None) -> int:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        result = int(self._quick.el_wait(self._handle, which, 0))
        while result == TIMEOUT and (end is None or time.monotonic() < end):
            self._look_for_retries()
            left_ms = SLICE_MS if end is None else min(SLICE_MS, _milliseconds(end - time.monotonic()))
            result = int(self._library.el_wait(self._handle, which, left_ms))
        return result

    def _look_for_retries(self) -> None:
        info = Failure()
        if self._quick.el_retried(self._handle, info) > 0 and info.file < len(self._files):
            self._readers.retries.note(self._files[info.file].path, info.offset, info.error)

    def _count_times(self) -> None:
        times, sizes = np.zeros((2, len(self._files)), np.uint64)
        self._quick.el_file_times(self._handle, times.ctypes.data, sizes.ctypes.data, len(self._files))
        for file, ns, nbytes in zip(self._files, times.tolist(), sizes.tolist(), strict=True):
            self._readers.times.add(file.path, ns / 1e9, nbytes)

    def _forget(self) -> None:
        if not self._forgotten:
            self._forgotten = True
            self._look_for_retries()
            self._count_times()
        self._owner = None
        self._readers.transfer_ended(self)

    def _info(self) -> Failure:
        info = Failure()
        self._quick.el_failure(self._handle, info)
        return info

    def _failure(self) -> TransferError:
        info = self._info()
        if info.in_flight == 0:
            self._forget()
        file = self._files[info.file] if info.file < len(self._files) else None
        path = "memory" if file is None else file.path
        if info.kind == FAIL_EOF and file is not None:
            return end_of_file(path, info.offset, file.size)
        if info.kind == FAIL_DEVICE and self._device is not None:
            return copy_error(path, info, self._readers.device_error(self._device, info.error))
        if info.kind == FAIL_DEADLINE and self._device is not None and info.tries == 0:
            return copy_overdue(path, info, self._readers.deadline_s)
        if info.kind == FAIL_DEADLINE:
            return deadline_passed(path, info.offset, deadline_of(file, self._readers.deadline_s))
        if info.kind == FAIL_CANCELLED:
            return TransferCancelled("the transfer was cancelled")
        if file is not None and file.native_access is not None:
            return usrbio_error(path, file.native_access, info)
        return io_error(path, info.offset, info.error, tries=info.tries)


def _milliseconds(seconds: float) -> int:
    # Rounded up: a wait of 0.4 ms must not become a busy loop of waits of 0.
    return max(0, int(seconds * 1e3 + 0.999))


def call_error(result: int) -> TransferError:
    if result == E_FORKED:
        return TransferError("reader threads do not survive a fork", hint="open the checkpoint again here")
    if result == E_CLOSED:
        return TransferError("the reader threads are closed")
    if result == E_MEMORY:
        return TransferError("not enough memory for the plan of a transfer")
    if result == E_THREAD:
        text = os.strerror(ctypes.get_errno())
        return TransferError(f"no thread could be started: {text}", hint="raise the pids limit")
    return TransferError(f"the native library refused the call ({result}): this is a bug of engine-loader")
