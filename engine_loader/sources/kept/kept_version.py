"""The ranges of one object that are kept on this node: found, read, and handed to whoever writes them."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

_FEWEST_BYTES = 16 << 10
"""A file for fewer costs more than it saves."""
MOST_BUFFERS = 1024
"""preadv takes at most this many (IOV_MAX)."""


class Keeper(Protocol):
    """Writes ranges to the disk, and makes room for them."""

    def offer(self, version: KeptVersion, begin: int, content: np.ndarray) -> None:
        """Have bytes written that begin at ``begin``, if that is possible; then ``version.add`` is called."""
        ...

    def release(self, version: KeptVersion) -> None:
        """This process reads the version no more."""
        ...


class KeptVersion:
    """The ranges that are kept of one version of an object. May be used from several threads.

    Args:
        directory: that holds them.
        size: of the object.
        keeper: writes what is to be kept.
    """

    def __init__(self, directory: Path, size: int, keeper: Keeper) -> None:
        self.directory = directory
        self._keeper = keeper
        self._size = size
        self._lock = threading.Lock()
        self._ranges: list[tuple[int, int]] = sorted(self._listed())
        self._longest = max((end - begin for begin, end in self._ranges), default=0)

    @property
    def kept_bytes(self) -> int:
        """How many bytes are kept, those of ranges that overlap more than once."""
        with self._lock:
            return sum(end - begin for begin, end in self._ranges)

    def read(self, offset: int, buffers: Sequence[memoryview], wanted: int) -> tuple[int, int]:
        """Fill ``buffers`` in turn from what is kept.

        Returns:
            How many of the ``wanted`` bytes were read; and where none was, how many have to be asked for elsewhere
            before the next range that is kept.
        """
        while True:
            found, following = self._around(offset)
            if found is None:
                # A gap that is too small to be kept is asked for with what follows.
                return 0, wanted if following is None else min(wanted, max(following - offset, _FEWEST_BYTES))
            begin, end = found
            nbytes = min(wanted, end - offset)
            if self._read(found, offset - begin, first_bytes(buffers, nbytes), nbytes):
                return nbytes, 0
            self._forget(found)

    def keep(self, offset: int, buffers: Sequence[memoryview], nbytes: int) -> None:
        """Have the first ``nbytes`` of ``buffers``, which were just read at ``offset``, kept."""
        if nbytes < _FEWEST_BYTES:
            return
        content = np.empty(nbytes, np.uint8)  # the buffers are a tensor's memory, which may be changed from now on
        done = 0
        for buffer in first_bytes(buffers, nbytes):
            np.copyto(content[done : done + len(buffer)], np.frombuffer(buffer, np.uint8))
            done += len(buffer)
        self._keeper.offer(self, offset, content)

    def close(self) -> None:
        """From now on it may be deleted to make room for others."""
        self._keeper.release(self)

    def add(self, begin: int, end: int) -> None:
        """A range is there now."""
        with self._lock:
            insort(self._ranges, (begin, end))
            self._longest = max(self._longest, end - begin)

    def _around(self, offset: int) -> tuple[tuple[int, int] | None, int | None]:
        """The range that holds ``offset`` and goes furthest, and where the next one begins."""
        with self._lock:
            place = bisect_right(self._ranges, (offset, self._size))
            following = self._ranges[place][0] if place < len(self._ranges) else None
            best: tuple[int, int] | None = None
            for begin, end in reversed(self._ranges[:place]):
                if begin + self._longest <= offset:
                    break
                if end > offset and (best is None or end > best[1]):
                    best = begin, end
            return best, following

    def _read(self, kept: tuple[int, int], offset: int, buffers: list[memoryview], nbytes: int) -> bool:
        """Whether all bytes came from the file of a range."""
        try:
            fd = os.open(self.directory / f"{kept[0]:x}-{kept[1]:x}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            if os.fstat(fd).st_size != kept[1] - kept[0]:
                return False
            done = 0
            while done < nbytes:
                got = os.preadv(fd, buffers[:MOST_BUFFERS], offset + done)
                if not got:
                    return False
                done += got
                buffers = _after(buffers, got)
            return True
        except OSError:  # of a disk that fails
            return False
        finally:
            os.close(fd)

    def _forget(self, kept: tuple[int, int]) -> None:
        with self._lock, suppress(ValueError):
            self._ranges.remove(kept)

    def _listed(self) -> Iterator[tuple[int, int]]:
        with suppress(OSError):
            for entry in os.scandir(self.directory):
                begin, _, end = entry.name.partition("-")
                with suppress(ValueError):
                    found = int(begin, 16), int(end, 16)
                    if 0 <= found[0] < found[1] <= self._size:
                        yield found


def first_bytes(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The first ``nbytes`` of the buffers together."""
    found = []
    for buffer in buffers:
        if not nbytes:
            break
        piece = buffer[:nbytes]
        nbytes -= len(piece)
        if len(piece):
            found.append(piece)
    return found


def _after(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """``buffers`` behind their first ``nbytes``."""
    left = list(buffers)
    while left and nbytes >= len(left[0]):
        nbytes -= len(left.pop(0))
    if nbytes:
        left[0] = left[0][nbytes:]
    return left
