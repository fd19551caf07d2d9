"""A plan of which a part goes by way of the window, as one transfer."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import numpy as np

from ...errors import TransferCancelled, TransferError
from ...failures import deadline_passed, io_error
from ...sources.source import SourceFile
from ..native.library import FAIL_CANCELLED, FAIL_DEADLINE, FAILED, OK, Failure
from ..native.transfer import CANCEL_GRACE_S, SLICE_MS, call_error
from ..native.usrbio_errors import deadline_of
from ..plan import EXTENT, Extents
from ..protocol import Transfer
from .window_library import load_quick_window, load_window

_stuck: list[object] = []
"""Owners of destinations to which a copy that never ended may still write."""


class SharedTransfer:
    """A plan in flight: what goes by way of the window, and the rest.

    What cannot be had by way of the window is read as without it, when somebody waits for it; so errors are the same.

    Args:
        handle: of the library, for what goes by way of the window, given back by the transfer; None: nothing does.
        past: starts extents past the window.
        files: that ``handle`` was made for.
        nbytes: of all.
        deadline_s: of the reader threads, for messages.
        owner: keeps the destinations alive.
    """

    def __init__(
        self,
        handle: ctypes.c_void_p | None,
        past: Callable[[Extents], Transfer],
        *,
        files: Sequence[SourceFile],
        nbytes: int,
        deadline_s: float,
        owner: object,
    ) -> None:
        self.nbytes = nbytes
        self._handle = handle
        self._parts: list[Transfer] = []
        self._past = past
        self._files = files
        self._deadline_s = deadline_s
        self._owner = owner
        self._library, self._quick = load_window(), load_quick_window()
        self._shared = handle is None  # all that could be had by way of the window is there

    def add(self, rest: Transfer) -> None:
        """Have the transfer be complete only when ``rest`` is, too."""
        self._parts.append(rest)

    def wait(self, extent: int | None = None, timeout_s: float | None = None) -> bool:
        # Of one extent, parts may be in both; it is waited for all.
        end = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._shared and not self._wait_for_shared(end):
            return False
        if not all(part.wait(timeout_s=_left(end)) for part in self._parts):
            return False
        self._owner = None
        return True

    @property
    def bytes_done(self) -> int:
        return int(self._quick.el_shared_bytes_done(self._handle)) + sum(part.bytes_done for part in self._parts)

    def cancel(self) -> None:
        for part in self._parts:
            part.cancel()
        end = time.monotonic() + CANCEL_GRACE_S
        while self._library.el_shared_cancel(self._handle, SLICE_MS) == 1:
            if time.monotonic() >= end:
                _stuck.append(self._owner)
                return
        self._owner = None

    def __del__(self) -> None:
        if self._owner is not None and not self._shared:
            self.cancel()
        self._quick.el_shared_release(self._handle)

    def _wait_for_shared(self, end: float | None) -> bool:
        result = int(self._quick.el_shared_wait(self._handle, 0))
        while result not in (OK, FAILED):
            if result < 0:
                raise call_error(result)
            left = _left(end)
            if left == 0:
                return False
            result = int(self._library.el_shared_wait(self._handle, SLICE_MS if left is None else _slice(left)))
        if result == FAILED:
            raise self._failure()
        count = int(self._quick.el_shared_left(self._handle, None, 0))
        if count:
            left_over = np.empty(count, EXTENT)
            self._quick.el_shared_left(self._handle, left_over.ctypes.data, count)
            self._parts.append(self._past(left_over))
        self._shared = True
        return True

    def _failure(self) -> TransferError:
        info = Failure()
        self._quick.el_shared_failure(self._handle, info)
        if info.kind == FAIL_CANCELLED:
            return TransferCancelled("the transfer was cancelled")
        file = self._files[info.file]
        if info.kind == FAIL_DEADLINE:
            return deadline_passed(file.path, info.offset, deadline_of(file, self._deadline_s))
        return io_error(file.path, info.offset, info.error, tries=info.tries)


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


def _slice(seconds: float) -> int:
    return min(SLICE_MS, int(seconds * 1e3 + 0.999))
