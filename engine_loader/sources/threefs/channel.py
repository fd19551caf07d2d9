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
from .links import Ledger, directory_of_links, ring_links_of_this_process
from .read_failures import no_answer, no_ring, no_room, read_failed
from .watched import NoAnswer, WatchedThread

_SLICE = timedelta(milliseconds=100)
# Every IO completes by itself. -1 would do the same, but daemons of 2026 refuse rings of a negative depth.
_IO_DEPTH = 1
_FORBID_READ_HOLES = 2
_TRIES = 3
_CLOSE_WAIT_S = 1.0


class Channel:
    """A ring, its buffer, and the thread that makes all calls for them.

    The daemon cleans up after a client by the thread that has 3fs-virt/iovs open: so that thread makes the links, opens
    the directory first and closes it last. It is left behind when a call does not return.

    Args:
        binding: ``hf3fs_py_usrbio``, or an object with its interface.
        mount: the 3FS mount.
        buffer_bytes: the size of the buffer: so many bytes can be in flight.
        io_bytes: the largest IO.
        deadline_s: how long 3FS may take to make ring and buffer.

    Raises:
        OSError: 3FS refuses, or ENOSPC: there is no room in /dev/shm.
        NoAnswer: the mount did not answer in time.
    """

    def __init__(self, binding: Any, mount: str, buffer_bytes: int, io_bytes: int, deadline_s: float) -> None:
        self.io_bytes = io_bytes
        self.idle = True
        self._binding, self._mount = binding, mount
        self._ring: Any = None
        self._ring_links: list[str] = []
        self._iovec: Any = None
        self._directory = -1
        self._closing = threading.Event()
        name = str(uuid.uuid4())
        self._shared = f"/dev/shm/engine-loader-{name}"
        self._link = os.path.join(directory_of_links(mount), name)
        self._progress = time.monotonic()
        # First of all: a process may end at any moment, and leaves nothing that is not listed.
        self._ledger: Ledger | None = Ledger(name)
        self._ledger.add(self._link, self._shared)
        try:
            self._memory = _shared_memory(self._shared, buffer_bytes)
        except BaseException:
            self._ledger.close()
            raise
        self._thread = WatchedThread("engine-loader-3fs-ring")
        try:
            self._thread.call(self._make, deadline_s)
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
        self.idle = False
        self._progress = time.monotonic()
        try:
            results = self._thread.call(
                lambda: self._carry_out(path, fd, offset, wanted, deadline_s),
                deadline_s + _CLOSE_WAIT_S,
                progress=lambda: self._progress,
            )
        except NoAnswer:
            raise no_answer(path, "the library does not return", deadline_s) from None
        self.idle = True
        done = 0
        for start in range(0, wanted, self.io_bytes):
            result = results[start]
            if result < 0 and result != -errno.ENODATA and done == 0:
                if -result in RETRYABLE:
                    raise OSError(-result, os.strerror(-result), path)
                raise read_failed(path, offset, -result, 1)
            done += max(0, result)
            if result < min(self.io_bytes, wanted - start):
                break
        _copy(np.frombuffer(self._memory, np.uint8, done), buffers)
        return done

    def close(self) -> None:
        """Give back ring, buffer and links. A late read lands in memory that is not used again. Safe to call twice.

        What 3FS does not answer within a second is left to the thread.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.end(self._unmake, _CLOSE_WAIT_S)

    def _make(self) -> None:
        self._directory = os.open(directory_of_links(self._mount), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.symlink(self._shared, self._link)
        self._iovec = self._binding.iovec(self._memory, os.path.basename(self._link), self._mount)
        entries = 2 * max(1, len(self._memory) // self.io_bytes)
        self._ring = self._binding.ioring(self._mount, entries, True, _IO_DEPTH, flags=_FORBID_READ_HOLES)
        self._ring_links = self._links_of_ring()
        if self._ledger is not None:
            self._ledger.add(*self._ring_links)

    def _links_of_ring(self) -> list[str]:
        name = getattr(self._ring, "link_name", None)
        directory = directory_of_links(self._mount)
        if name is not None:
            return [os.path.join(directory, name)]
        with _links_taken_lock:
            found = [link for link in ring_links_of_this_process(self._mount) if link not in _links_taken]
            _links_taken.update(found)
        return found

    def _unmake(self) -> None:
        """In the order in which a crash on the way leaves least: the daemon's rings, its buffers, the directory."""
        _unlink(*self._ring_links)
        if self._ring is not None:
            self._ring.destroy()
        self._ring = None
        self._iovec = None
        _unlink(self._link, self._shared)
        if self._ledger is not None:
            self._ledger.close()
        self._ledger = None
        if self._directory >= 0:
            os.close(self._directory)
        self._directory = -1

    def _carry_out(self, path: str, fd: int, offset: int, wanted: int, deadline_s: float) -> dict[int, int]:
        """Read in IOs of up to ``io_bytes``; start in the buffer -> result of each.

        An IO with a retryable error is retried at once, so that the bytes after it are not lost.
        """
        waiting = deque(range(0, wanted, self.io_bytes))
        tries = dict.fromkeys(waiting, 0)
        results: dict[int, int] = {}
        in_flight = 0
        progress = time.monotonic()
        while len(results) < len(tries) and not self._closing.is_set():
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
            self._progress = time.monotonic()
            if self._progress - progress > deadline_s:
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


_links_taken: set[str] = set()
_links_taken_lock = threading.Lock()
"""Links of rings of this process that a channel knows as its own, where the binding does not name them."""

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
        channel = self._take(path, deadline_s)
        try:
            done = channel.read(path, fd, offset, buffers, deadline_s)
        except BaseException:
            if channel.idle:
                self._put(channel)
            else:  # what is in flight would be taken for the completions of the next read
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

    def _take(self, path: str, deadline_s: float) -> Channel:
        with self._lock:
            if os.getpid() != self._pid:  # rings do not survive a fork
                _left_by_parent.extend(self._idle)
                self._idle, self._pid = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        binding, mount, buffer_bytes, io_bytes = self._arguments
        try:
            return Channel(binding, mount, buffer_bytes, io_bytes, deadline_s)
        except NoAnswer:
            raise no_answer(path, "it makes no ring", deadline_s) from None
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


def _unlink(*paths: str) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


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
