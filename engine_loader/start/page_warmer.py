"""The process that reads weights into the page cache while an engine imports: no torch, no engine, no settings.

It gets the files' paths on its standard input, and ends when they are read, when that input ends (the process that
started it is gone), or when a loader tells it that it begins to read (``name_of``). It reads in the order of the files,
large pieces at the lowest priority for disks and CPUs, leaves out what lies in the page cache, and never has more there
than the cgroup and the machine have room for (``Budget``). What it did it says as one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from ..machine import Memory, memory
from ..residency import IN_MEMORY, cached_pages, file_system
from .pace import Pace

END_OF_PATHS = b"\0\0"
_PIECE_BYTES = 1 << 20
_READ_BYTES = 256 << 10  # small enough to stay in the CPU's cache: what is read is thrown away
_READERS = 32
_LOOK_S = 0.2
_LEAST_RESERVE_BYTES = 256 << 20
_RESERVE = 4  # a part of the memory that is left for the engine's own
_LIES_IN_MEMORY = -2
_SET_PARENT_DEATH_SIGNAL = 1
_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_LAST_BEST_EFFORT = 2 << 13 | 7  # not the idle class: its reads may starve, and a loader wait for the same pages
_NICE = 19


class Budget:
    """How many bytes may be in the page cache: what is available now, but for a reserve for the engine itself.

    Args:
        look: the memory of the machine and the cgroup as it is.
    """

    def __init__(self, look: Callable[[], Memory] = memory) -> None:
        self._look = look
        self._seen = (-1.0, 0)

    def bytes(self) -> int:
        """The room, as of a fraction of a second ago; what was warmed counts as available, for the kernel frees it."""
        at, room = self._seen
        now = time.monotonic()
        if at < 0 or now - at >= _LOOK_S:
            found = self._look()
            limit = found.total if found.limit is None else min(found.total, found.limit)
            room = max(0, found.available - max(_LEAST_RESERVE_BYTES, limit // _RESERVE))
            self._seen = (now, room)
        return room


class Warming:
    """Files on their way into the page cache.

    Args:
        paths: the files, in the order in which they will be read.
        budget: how much of them may be there.

    Attributes:
        read: bytes that were read.
        resident: bytes that lay in the page cache already.
        size: bytes of all files that could be opened, but for those in memory.
        reason: why it ended before all was read; "" where it did not.
        readers: threads that should read.
    """

    def __init__(self, paths: Sequence[str], budget: Budget) -> None:
        self.read = self.resident = self.size = 0
        self._claimed = 0  # bytes that were read, or are on their way
        self._budget = budget
        self._lock = threading.Lock()
        opened = list(map(_opened, paths))
        self._files = [fd for fd in opened if fd >= 0]
        self.reason = "they lie in memory" if _LIES_IN_MEMORY in opened and not self._files else ""
        self._pieces = self._all_pieces()
        self.readers = _READERS
        self._pace = Pace(_READERS)
        self.size = sum(os.fstat(fd).st_size for fd in self._files)

    def _all_pieces(self) -> Iterator[tuple[int, int, int]]:
        for fd in self._files:
            size = os.fstat(fd).st_size
            for offset in range(0, size, _PIECE_BYTES):
                yield fd, offset, min(_PIECE_BYTES, size - offset)

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read pieces until there are no more, there is no room, or ``stopped``; several threads may call this."""
        buffer = memoryview(bytearray(_READ_BYTES))
        while not stopped() and not self.reason:
            with self._lock:
                piece = next(self._pieces, None)
                if piece is None:
                    return
                there = _resident_bytes(*piece)
                self.resident += there
                if there >= piece[2]:
                    continue
                if self._claimed + self.resident + piece[2] > self._budget.bytes():
                    self.reason = "there is no room for more"
                    return
                self._claimed += piece[2] - there
            with self._pace.read(stopped) as came:
                came.append(self._fetch(*piece, there, buffer))

    def _fetch(self, fd: int, offset: int, length: int, there: int, buffer: memoryview) -> int:
        done = 0
        try:
            # All of the piece is on its way then, in as many requests as the file system makes of it.
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
            while done < length:
                got = os.preadv(fd, [buffer[: length - done]], offset + done)
                if got == 0:  # it was cut short: whoever loads it says so
                    break
                done += got
        except OSError as error:
            self.reason = f"it could not be read ({error.strerror})"
        with self._lock:
            self.read += max(0, done - there)
        return max(0, done - there)

    def account(self) -> dict[str, object]:
        """What was done, for the process that asked."""
        return {"read": self.read, "resident": self.resident, "size": self.size, "reason": self.reason}


def name_of(path: str) -> str:
    """The abstract socket by which a loader tells that it begins to read what is in the directory of ``path``.

    A name of the kernel's and no file: it is gone with the process, however that ends, and only one process has it.
    """
    found = os.stat(os.path.dirname(os.path.abspath(path)))
    return f"\0engine_loader-warm-{os.geteuid()}-{found.st_dev:x}-{found.st_ino:x}"


def listen(path: str) -> socket.socket | None:
    """The socket on which the end is told; None where another process warms this directory already.

    Raises:
        OSError: the directory is not there.
    """
    name = name_of(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listening.bind(name)
        listening.listen(16)
    except OSError:
        listening.close()
        return None
    return listening


def warm_once(paths: Sequence[str], lifeline: int | None = None) -> dict[str, object]:
    """Read the files into the page cache as far as there is room, unless another process does; what was done.

    Args:
        paths: of one directory, in the order in which they will be read.
        lifeline: see ``warm``.
    """
    try:
        listening = listen(paths[0])
    except OSError as error:
        return {"reason": f"their directory cannot be read ({error.strerror})"}
    if listening is None:
        return {"reason": "another process does it already"}
    with listening:
        warming = Warming(paths, Budget())
        warm(warming, listening, lifeline)
        return warming.account()


def warm(warming: Warming, listening: socket.socket, lifeline: int | None = None) -> None:
    """Have several threads read until they are done, a loader begins to read, or the ``lifeline`` ends.

    Args:
        warming: what is read.
        listening: on which a loader tells that it begins.
        lifeline: a descriptor that is at its end when the process that asked is gone; None: there is none.
    """
    done, tell = os.pipe2(os.O_CLOEXEC)
    ended = threading.Event()

    def work() -> None:
        try:
            warming.run(ended.is_set)
        finally:
            os.write(tell, b".")

    for _ in range(warming.readers):
        # Not waited for: the process ends with reads that hang.
        threading.Thread(target=work, daemon=True).start()
    poll = select.poll()
    for descriptor in (done, listening.fileno(), *([] if lifeline is None else [lifeline])):
        poll.register(descriptor, select.POLLIN)
    left = warming.readers
    while left:
        for descriptor, _ in poll.poll():
            if descriptor == done:
                left -= len(os.read(done, left))
            elif descriptor == listening.fileno():
                if _is_told(listening):
                    warming.reason = "the loader began"
                    ended.set()
                    return
            elif not os.read(lifeline or 0, 1):
                ended.set()
                return


def lower_priority() -> None:
    """Come last, for disks (where their scheduler knows priorities) and CPUs."""
    os.nice(_NICE)
    number = _SYS_IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        # Of this process; its threads inherit it.
        ctypes.CDLL(None).syscall(ctypes.c_long(number), 1, 0, _LAST_BEST_EFFORT)


def main() -> None:
    """What the process does."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the process that asked says when it ends
    lower_priority()
    paths = _read_paths()
    os.write(1, json.dumps(warm_once(paths, 0)).encode())
    os._exit(0)  # a thread may be in a read that hangs


def _read_paths() -> list[str]:
    data = b""
    while not data.endswith(END_OF_PATHS):
        more = os.read(0, 65536)
        if not more:
            sys.exit(0)
        data += more
    return [os.fsdecode(path) for path in data.removesuffix(END_OF_PATHS).split(b"\0")]


def _opened(path: str) -> int:
    """A descriptor; -1: it could not be opened, or ``_LIES_IN_MEMORY``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # whoever loads it says so
        return -1
    if file_system(fd) in IN_MEMORY:
        os.close(fd)
        return _LIES_IN_MEMORY
    return fd


def _resident_bytes(fd: int, offset: int, length: int) -> int:
    pages = cached_pages(fd, offset, length) or 0
    return min(length, pages * mmap.PAGESIZE)


def _is_told(listening: socket.socket) -> bool:
    """Whether one that may has told: this user, or root."""
    try:
        connection, _ = listening.accept()
    except OSError:
        return False
    with connection:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return struct.unpack("3i", credentials)[1] in (0, os.geteuid())
