"""Files on their way into the page cache: in which pieces they are read, by how many threads, and how much of them.

Of this package, only what needs nothing but the standard library is imported here (see page_warmer.py).
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from ..machine import Memory, memory
from ..residency import IN_MEMORY, cached_pages, file_system
from .pace import Pace

Ranges: TypeAlias = Sequence[tuple[int, int]]
"""(offset, length) in bytes, in the order of a file."""
_PIECE_BYTES = 1 << 20
_READ_BYTES = 256 << 10  # small enough to stay in the CPU's cache: what is read is thrown away
_READERS = 32  # network file systems and FUSE answer each request late; how many of them read, their pace says
READERS_OF_EACH = 8  # of files that the engine itself waits for, always all
_LOOK_S = 0.2
_LEAST_RESERVE_BYTES = 256 << 20
_RESERVE = 4  # a part of the memory that is left for the engine's own
NO_ROOM = "there is no room for more"


class Budget:
    """How many bytes may be in memory: what is available now, but for a reserve for the engine itself.

    Args:
        look: the memory of the machine and the cgroup as it is.
        freed: whether what is taken counts as available, since the kernel frees it (the page cache).
        for_weights: bytes that the engine will need for its weights beside the reserve; of use where ``freed`` is
            false, for it may have to find them while what is taken is still there.
    """

    def __init__(self, look: Callable[[], Memory] = memory, *, freed: bool = True, for_weights: int = 0) -> None:
        self._look = look
        self._for_weights = for_weights
        self._freed = freed
        self._seen = (-1.0, 0)
        self._taken = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int, *, resident: bool = False) -> bool:
        """Count bytes that will be in memory, or are; False where there is no room for them.

        Args:
            nbytes: how many.
            resident: they are there already, and are only counted.
        """
        with self._lock:
            if not resident and self._taken + nbytes > self.bytes():
                return False
            self._taken += nbytes
            return True

    def bytes(self) -> int:
        """The room, as of a fraction of a second ago."""
        at, room = self._seen
        now = time.monotonic()
        if at < 0 or now - at >= _LOOK_S:
            found = self._look()
            limit = found.total if found.limit is None else min(found.total, found.limit)
            reserve = max(_LEAST_RESERVE_BYTES, limit // _RESERVE) + self._for_weights
            room = max(0, found.available - reserve)
            self._seen = (now, room)
            if not self._freed:  # it is part of what is in use now
                self._taken = 0
        return room


class _Opened:
    """An open file, closed when all of its pieces have been read."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._users = 1

    def use(self) -> None:
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if self._users == 0:
            os.close(self.fd)


class Warming:
    """Files on their way into the page cache. A file is open only while it is read, however many there are.

    Args:
        paths: the files, in the order in which they will be read.
        budget: how much of them may be there.
        ranges: path -> what of it will be read; of files that are not in it, all.
        kind: of file system that they are on; None: it is looked up.
        pace: how many reads may be on their way; None: one of its own.

    Attributes:
        read: bytes that were read.
        resident: bytes that lay in the page cache already.
        size: bytes of all that is to be there, but for files that cannot be opened and those in memory.
        reason: why it ended before all was read; "" where it did not.
        readers: threads that should read.
    """

    def __init__(
        self,
        paths: Sequence[str],
        budget: Budget,
        ranges: Mapping[str, Ranges] | None = None,
        *,
        kind: str | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.readers = _READERS
        self.read = self.resident = 0
        self._budget = budget
        self._lock = threading.Lock()
        wanted = [(path, found) for path in paths if (found := _wanted(path, (ranges or {}).get(path)))]
        self.size = sum(length for _, found in wanted for _, length in found)
        if kind is None:
            kind = next(filter(None, (_kind_of(path) for path, _ in wanted)), None)
        self.reason = "they lie in memory" if kind in IN_MEMORY else ""
        if self.reason:
            self.size = 0
        self._pace = pace or Pace(self.readers)
        self._pieces = self._all_pieces(wanted)

    def _all_pieces(self, wanted: Sequence[tuple[str, Ranges]]) -> Iterator[tuple[_Opened, int, int]]:
        for path, ranges in wanted:
            fd = _opened(path)
            if fd is None:
                self.size -= sum(length for _, length in ranges)
                continue
            file = _Opened(fd)
            try:
                size = os.fstat(fd).st_size
                for first, length in ranges:
                    end = min(first + length, size)
                    for offset in range(first, end, _PIECE_BYTES):
                        yield file, offset, min(_PIECE_BYTES, end - offset)
            finally:
                file.leave()

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read pieces until there are no more, there is no room, or ``stopped``; several threads may call this."""
        buffer = memoryview(bytearray(_READ_BYTES))
        while not stopped() and not self.reason:
            with self._lock:
                piece = next(self._pieces, None)
                if piece is None:
                    return
                file, offset, length = piece
                there = _resident_bytes(file.fd, offset, length)
                self.resident += there
                if not self._budget.take(length, resident=there >= length):
                    self.reason = NO_ROOM
                    return
                if there >= length:
                    continue
                file.use()
            with self._pace.read(stopped) as came:
                came.append(self._fetch(file.fd, offset, length, there, buffer))
            with self._lock:
                file.leave()

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
        came = max(0, done - there)
        with self._lock:
            self.read += came
        return came

    def account(self) -> dict[str, object]:
        """What was done, for the process that asked."""
        return {"read": self.read, "resident": self.resident, "size": self.size, "reason": self.reason}


class WarmingEach:
    """Many files on their way into the page cache, each opened by one thread, so that several are looked up at once.
    The last ones, if they are large, are read by all threads together.

    Args:
        paths: the files, in the order in which they will be read; what is no plain file, or cannot be read, is passed
            over.
        budget: how much of them may be there.
        ranges: path -> what of it will be read; of files that are not in it, all.

    Attributes:
        budget: as given.
        reason: why it ended before all was read; "" where it did not.
        readers: threads that should read.
        files: that were read, or lay in the page cache; this and the next ones are known after ``add_up``.
        read: bytes that were read.
        resident: bytes that lay in the page cache already.
        seconds: that it took.
    """

    readers = READERS_OF_EACH

    def __init__(self, paths: Iterable[str], budget: Budget, ranges: Mapping[str, Ranges] | None = None) -> None:
        self.budget = budget
        self.reason = ""
        self.files = self.read = self.resident = 0
        self.seconds = 0.0
        self._paths = iter(paths)
        self._ranges = ranges
        self._pace = Pace(READERS_OF_EACH, READERS_OF_EACH)
        self._begun: list[Warming] = []
        self._under_way: set[Warming] = set()
        self._lock = threading.Lock()

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read files until there are no more, there is no room, or ``stopped``; several threads may call this."""
        while not stopped() and not self.reason:
            with self._lock:
                path = next(self._paths, None)
            if path is None:
                with self._lock:
                    left = list(self._under_way)
                for other in left:
                    other.run(stopped)
                return
            one = Warming([path], self.budget, self._ranges, kind="", pace=self._pace)
            with self._lock:
                self._begun.append(one)
                self._under_way.add(one)
            one.run(stopped)
            with self._lock:
                self._under_way.discard(one)
            if one.reason == NO_ROOM:
                self.reason = one.reason

    def add_up(self, seconds: float) -> None:
        """Count what was done in ``seconds``, when it has ended."""
        self.seconds = seconds
        self.files = sum(bool(one.read or one.resident) for one in self._begun)
        self.read = sum(one.read for one in self._begun)
        self.resident = sum(one.resident for one in self._begun)


def _wanted(path: str, ranges: Ranges | None) -> Ranges:
    """What is to be read of a file, from whole pages on; nothing where there is none: whoever loads it says so."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        return ()
    if ranges is None:
        return ((0, found.st_size),)
    begun = [(first - first % mmap.PAGESIZE, min(first + length, found.st_size)) for first, length in ranges]
    return [(first, end - first) for first, end in begun if 0 <= first < end]


def _opened(path: str) -> int | None:
    """A descriptor; None: it could not be opened."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None


def _kind_of(path: str) -> str | None:
    """The name of a file's file system; None: it could not be opened."""
    fd = _opened(path)
    if fd is None:
        return None
    try:
        return file_system(fd)
    finally:
        os.close(fd)


def _resident_bytes(fd: int, offset: int, length: int) -> int:
    pages = cached_pages(fd, offset, length) or 0
    return min(length, pages * mmap.PAGESIZE)
