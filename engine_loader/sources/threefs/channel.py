"""Reading by USRBIO from Python: a ring with a buffer in shared memory, used by one thread at a time.

Used without the native reader threads, or where only the binding ``hf3fs_py_usrbio`` is there, which they cannot load.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from ...failures import RETRYABLE, deadline_passed
from .read_failures import no_ring, no_room, read_failed
from .shared_library import VIRTUAL_DIR

_SLICE = timedelta(milliseconds=100)
_IO_DEPTH = -1  # every IO completes by itself
_TRIES = 3


class Channel:
    """A ring and its buffer.

    Args:
        binding: ``hf3fs_py_usrbio``, or an object with its interface.
        mount: the 3FS mount.
        buffer_bytes: the size of the buffer: so many bytes can be in flight.
        io_bytes: the largest IO.

    Raises:
        OSError: 3FS refuses, or ENOSPC: there is no room in /dev/shm.
    """

    def __init__(self, binding: Any, mount: str, buffer_bytes: int, io_bytes: int) -> None:
        self.io_bytes = io_bytes
        self._ring: Any = None
        self._iovec: Any = None
        name = str(uuid.uuid4())
        self._shared = f"/dev/shm/engine-loader-{name}"
        self._link = os.path.join(mount, VIRTUAL_DIR, "iovs", name)
        self._memory = _shared_memory(self._shared, buffer_bytes)
        try:
            os.symlink(self._shared, self._link)
            self._iovec = binding.iovec(self._memory, name, mount)
            self._ring = binding.ioring(mount, 2 * max(1, buffer_bytes // io_bytes), True, _IO_DEPTH)
        except BaseException:
            self.close()
            raise

    def read(self, path: str, fd: int, offset: int, buffers: Sequence[memoryview], deadline_s: float) -> int:
        """Fill ``buffers`` in turn with the bytes at ``offset``; returns how many came before the first gap.

        Raises:
            OSError: 3FS reported a retryable error for the first bytes.
            TransferError: the error is not retryable, or no byte came for ``deadline_s``; the channel must not be used
                again.
        """
        wanted = min(sum(map(len, buffers)), len(self._memory))
        results = self._carry_out(path, fd, offset, wanted, deadline_s)
        done = 0
        for start in range(0, wanted, self.io_bytes):
            result = results[start]
            if result < 0 and done == 0:
                if -result in RETRYABLE:
                    raise OSError(-result, os.strerror(-result), path)
                raise read_failed(path, offset, -result, 1)
            done += max(0, result)
            if result < min(self.io_bytes, wanted - start):
                break
        _copy(np.frombuffer(self._memory, np.uint8, done), buffers)
        return done

    def close(self) -> None:
        """Give back ring, buffer and link. A late read lands in memory that is not used again. Safe to call twice."""
        self._ring = None
        self._iovec = None
        for path in (self._link, self._shared):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _carry_out(self, path: str, fd: int, offset: int, wanted: int, deadline_s: float) -> dict[int, int]:
        """Read in IOs of up to ``io_bytes``; start in the buffer -> result of each.

        An IO with a retryable error is retried at once, so that the bytes after it are not lost.
        """
        waiting = deque(range(0, wanted, self.io_bytes))
        tries = dict.fromkeys(waiting, 0)
        results: dict[int, int] = {}
        in_flight = 0
        progress = time.monotonic()
        while len(results) < len(tries):
            while waiting:
                start = waiting[0]
                piece = self._iovec[start : min(start + self.io_bytes, wanted)]
                if not self._prepare(piece, fd, offset + start):
                    break
                tries[waiting.popleft()] += 1
                in_flight += 1
            if not in_flight:  # the ring is full though none of our IOs is in flight: a slot is free in a moment
                time.sleep(0.001)
            else:
                for piece in self._ring.wait(max_results=in_flight, min_results=1, timeout=_SLICE):
                    in_flight -= 1
                    start, result = piece.base_off, piece.result
                    progress = time.monotonic()
                    if -result in RETRYABLE and tries[start] < _TRIES:
                        waiting.append(start)
                    else:
                        results[start] = result
            if time.monotonic() - progress > deadline_s:
                raise deadline_passed(path, offset, deadline_s)
        return results

    def _prepare(self, piece: Any, fd: int, offset: int) -> bool:
        try:
            self._ring.prepare(piece, True, fd, offset)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            raise
        self._ring.submit()
        return True


_left_by_parent: list[Channel] = []
"""Channels of the parent of this forked process: kept, because collecting one would destroy its ring in the parent."""


class ChannelPool:
    """The idle channels of a mount, for the threads that read from it.

    Args:
        binding, mount, buffer_bytes, io_bytes: arguments of each Channel.
    """

    def __init__(self, binding: Any, mount: str, buffer_bytes: int, io_bytes: int) -> None:
        self._arguments = (binding, mount, buffer_bytes, io_bytes)
        self._idle: list[Channel] = []
        self._lock = threading.Lock()
        self._users = 0
        self._pid = os.getpid()

    def read(self, path: str, fd: int, offset: int, buffers: Sequence[memoryview], deadline_s: float) -> int:
        """Read by an idle channel, or by a new one; arguments and errors are those of ``Channel.read``."""
        channel = self._take(path)
        try:
            done = channel.read(path, fd, offset, buffers, deadline_s)
        except OSError:
            self._put(channel)
            raise
        except BaseException:
            channel.close()
            raise
        self._put(channel)
        return done

    def open(self) -> None:
        """Count a file that was opened."""
        with self._lock:
            self._users += 1

    def close(self) -> None:
        """Count a file that was closed; the last one closes the idle channels."""
        if os.getpid() != self._pid:
            return  # in a forked child: the rings belong to the parent
        with self._lock:
            self._users -= 1
            idle, self._idle = (self._idle, []) if self._users <= 0 else ([], self._idle)
        for channel in idle:
            channel.close()

    def _take(self, path: str) -> Channel:
        with self._lock:
            if os.getpid() != self._pid:  # rings do not survive a fork
                _left_by_parent.extend(self._idle)
                self._idle, self._pid = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        binding, mount, buffer_bytes, io_bytes = self._arguments
        try:
            return Channel(binding, mount, buffer_bytes, io_bytes)
        except OSError as error:
            code = error.errno or errno.EIO
            if code == errno.ENOSPC:
                raise no_room(path, buffer_bytes, code) from None
            raise no_ring(path, mount, "ring", code) from None

    def _put(self, channel: Channel) -> None:
        with self._lock:
            if self._users > 0:
                self._idle.append(channel)
                return
        channel.close()


def _copy(source: np.ndarray[Any, np.dtype[np.uint8]], buffers: Sequence[memoryview]) -> None:
    """Copy into the buffers in turn; numpy lets other threads run meanwhile."""
    at = 0
    for buffer in buffers:
        if at == len(source):
            return
        part = source[at : at + len(buffer)]
        np.copyto(np.frombuffer(buffer, np.uint8, len(part)), part)
        at += len(part)


def _shared_memory(path: str, nbytes: int) -> mmap.mmap:
    """New shared memory, its pages allocated: touching a page that /dev/shm has no room for is a SIGBUS."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _check_room(nbytes)
        os.posix_fallocate(fd, 0, nbytes)
        return mmap.mmap(fd, nbytes)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def _check_room(nbytes: int) -> None:
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"/dev/shm has {free} bytes left, and a buffer takes {nbytes}", "/dev/shm")
