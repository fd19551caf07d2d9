"""Reading by USRBIO from Python: a ring with a buffer in shared memory, used by one thread at a time.

For where there is no native library, or the binding ``hf3fs_py_usrbio`` but no library that native code could load.
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
from .failures import no_ring, no_room, read_failed
from .library import VIRTUAL_DIR

_SLICE = timedelta(milliseconds=100)
_IO_DEPTH = -1  # every IO completes by itself
_TRIES = 3


class Channel:
    """A ring and its buffer.

    Args:
        binding: ``hf3fs_py_usrbio`` or what has its interface.
        mount: the 3FS mount.
        buffer_bytes: what can be in flight.
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
            OSError: 3FS reported an error for the first bytes that may pass.
            TransferError: it will not pass, or nothing came for ``deadline_s``; the channel must not be used again.
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
        """Give back ring, buffer and link. A late read then lands in memory that nobody uses. Safe to call twice."""
        self._ring = None
        self._iovec = None
        for path in (self._link, self._shared):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _carry_out(self, path: str, fd: int, offset: int, wanted: int, deadline_s: float) -> dict[int, int]:
        """Read in IOs of up to ``io_bytes``; start in the buffer -> result of each.

        An IO whose error may pass is tried again at once, so that it does not cost its neighbours their bytes.
        """
        waiting = deque(range(0, wanted, self.io_bytes))
        tries = dict.fromkeys(waiting, 0)
        results: dict[int, int] = {}
        flying = 0
        progress = time.monotonic()
        while len(results) < len(tries):
            while waiting:
                start = waiting[0]
                piece = self._iovec[start : min(start + self.io_bytes, wanted)]
                if not self._prepare(piece, fd, offset + start):
                    break
                tries[waiting.popleft()] += 1
                flying += 1
            if not flying:  # the ring is full, and not of our IOs: a moment later it is not
                time.sleep(0.001)
            else:
                for piece in self._ring.wait(max_results=flying, min_results=1, timeout=_SLICE):
                    flying -= 1
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


class ChannelPool:
    """Channels that are not in use, for the threads that come to read.

    Args:
        binding, mount, buffer_bytes, io_bytes: of the channels, see Channel.
    """

    def __init__(self, binding: Any, mount: str, buffer_bytes: int, io_bytes: int) -> None:
        self._arguments = (binding, mount, buffer_bytes, io_bytes)
        self._idle: list[Channel] = []
        self._lock = threading.Lock()
        self._users = 0
        self._pid = os.getpid()

    def read(self, path: str, fd: int, offset: int, buffers: Sequence[memoryview], deadline_s: float) -> int:
        """As Channel.read, by a channel that is free."""
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
        """Another file will be read."""
        with self._lock:
            self._users += 1

    def close(self) -> None:
        """A file will not be read any more; with the last one go the channels."""
        if os.getpid() != self._pid:
            return  # the parent's rings are the parent's
        with self._lock:
            self._users -= 1
            idle, self._idle = (self._idle, []) if self._users <= 0 else ([], self._idle)
        for channel in idle:
            channel.close()

    def _take(self, path: str) -> Channel:
        with self._lock:
            if os.getpid() != self._pid:  # no ring survives a fork; and ending the parent's would end it there, too
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
    """New shared memory. Its pages are real: touching what /dev/shm has no room for would end the process."""
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
