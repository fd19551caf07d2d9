"""A stock while it is filled: in which pieces the files are read, and which of them are there."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import EngineLoaderError
from ..settings import LoaderSettings
from ..sources.registry import make_source
from ..sources.source import Source, SourceFile
from ..sources.stock import StockedPart
from ..start.pace import Pace
from ..start.page_reading import NO_ROOM, Budget, Ranges
from ..transfer.constructor import make_readers_for
from ..transfer.plan import extent, make_extents
from ..transfer.protocol import ReaderThreads, wait_or_cancel
from .handing_over import SEALS

_LOCAL_PIECE_BYTES = 1 << 20
"""What anybody else reads from a disk waits behind what is on its way: see pace.py."""
_PIECE_BYTES = 4 << 20
_MOST_READS = 32
_FIRST_READS = 8
_LEAVE_S = 1.0
FULL = "no more than start.warm_bytes"


@dataclass(eq=False)
class _Opened:
    """An open file, closed when all of its pieces have been read.

    Attributes:
        file: which is open.
        identity: of the file as it was opened.
        readers: of its kind of file.
        users: pieces that are under way, and one while more come.
    """

    file: SourceFile
    identity: str
    readers: ReaderThreads
    users: int = 1

    def leave(self) -> None:
        """A user fewer."""
        self.users -= 1
        if self.users == 0:
            self.file.close()


class Filling:
    """Memory that is filled with the beginning of a model's weights, by the reader threads of the settings.

    Args:
        paths: the files, or their URLs, in the order in which they will be read.
        ranges: path -> what of it will be read; of files that are not in it, all.
        settings: how they are read.
        most_bytes: of memory.
        budget: how much of it there is room for.

    Attributes:
        descriptor: of the memory.
        readers: threads that should call ``run``.
        read: bytes that are there.
        reason: why it ended before all was read; "" where it did not.
    """

    readers = _MOST_READS

    def __init__(
        self,
        paths: Sequence[str],
        ranges: Mapping[str, Ranges],
        settings: LoaderSettings,
        most_bytes: int,
        budget: Budget,
    ) -> None:
        self.read = 0
        self.reason = ""
        self._ended = False
        self._settings = settings
        self._budget = budget
        self._lock = threading.Lock()
        self._taking = threading.Lock()  # a file is opened under it, which may take long
        self._readers: dict[tuple[bool, bool], ReaderThreads] = {}
        self._source: Source = make_source(settings.backend, settings=settings)
        self._pace = Pace(_MOST_READS)
        self._there: dict[str, list[StockedPart]] = defaultdict(list)
        self._most_bytes = most_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        self.descriptor = os.memfd_create("engine_loader-ahead", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self._most_bytes)
        # Takes no memory before it is written.
        self._memory = np.frombuffer(mmap.mmap(self.descriptor, self._most_bytes), np.uint8)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
        self._pieces = self._all_pieces(paths, ranges)

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read pieces until there are no more, there is no room, or ``stopped``; several threads may call this."""
        while not (stopped() or self.reason or self._ended):
            with self._taking:
                try:
                    piece = None if self.reason or self._ended else next(self._pieces, None)
                except EngineLoaderError as error:  # whoever loads them says so
                    self.reason = f"it could not be read ({error})"
                    return
                if piece is None:
                    return
                opened, offset, length, position = piece
                if not self._budget.take(length):
                    self.reason = NO_ROOM
                    return
                opened.users += 1
            try:
                with self._pace.read(stopped) as came:
                    if stopped():
                        return
                    self._fetch(opened, offset, length, position)
                    came.append(length)
            except EngineLoaderError as error:
                self.reason = f"it could not be read ({error})"
            finally:
                with self._taking:
                    opened.leave()

    def parts(self) -> dict[str, list[StockedPart]]:
        """Identity of a file -> what of it is there by now, in its order, neighbours joined."""
        with self._lock:
            return {identity: _joined(parts) for identity, parts in self._there.items()}

    def end_reading(self) -> None:
        """End the reader threads and close the files. Safe to call twice, and while ``run`` is at work."""
        self._ended = True
        if self._taking.acquire(timeout=_LEAVE_S):  # or a file is opened just now, and the process ends without it
            try:
                self._pieces.close()
                readers = list(self._readers.values())
                self._readers.clear()
            finally:
                self._taking.release()
            for one in readers:
                one.close()

    def close(self) -> None:
        """``end_reading``, and give up this process's part of the memory."""
        self.end_reading()
        os.close(self.descriptor)

    def _fetch(self, opened: _Opened, offset: int, length: int, position: int) -> None:
        target = self._memory[position : position + length]
        plan = make_extents([extent(0, offset, length, target.ctypes.data)])
        wait_or_cancel(opened.readers.submit([opened.file], plan, owner=target))
        with self._lock:
            self.read += length
            self._there[opened.identity].append(StockedPart(offset, offset + length, position))

    def _all_pieces(
        self, paths: Sequence[str], ranges: Mapping[str, Ranges]
    ) -> Generator[tuple[_Opened, int, int, int]]:
        """(file, offset, length, position in the memory) of each piece."""
        position = 0
        for path in paths:
            file = self._source.open(path)
            identity = file.identity()
            if identity is None:  # a loader could not tell that it is the same file
                file.close()
                continue
            if position == 0 and not file.mappable:
                self._pace.window = _FIRST_READS
            opened = _Opened(file, identity, self._readers_of(file))
            try:
                piece_bytes = self._piece_bytes(file)
                for first, length in ranges.get(path, ((0, file.size),)):
                    end = min(first + length, file.size)
                    # O_DIRECT reads straight into whole pages only.
                    position = -(-position // mmap.PAGESIZE) * mmap.PAGESIZE
                    for offset in range(first, end, piece_bytes):
                        nbytes = min(piece_bytes, end - offset, self._most_bytes - position)
                        if nbytes <= 0:
                            self.reason = FULL
                            return
                        yield opened, offset, nbytes, position
                        position += nbytes
            finally:
                opened.leave()

    def _piece_bytes(self, file: SourceFile) -> int:
        if file.remote:
            return int(self._settings.object_store_range_bytes)
        return _LOCAL_PIECE_BYTES if file.mappable else _PIECE_BYTES

    def _readers_of(self, file: SourceFile) -> ReaderThreads:
        kind = file.remote, file.fileno() is None
        if kind not in self._readers:
            self._readers[kind] = make_readers_for([file], self._settings)
        return self._readers[kind]


def _joined(parts: Sequence[StockedPart]) -> list[StockedPart]:
    found: list[StockedPart] = []
    for part in sorted(parts, key=lambda part: part.begin):
        last = found[-1] if found else None
        if last is not None and last.end == part.begin and last.position + last.end - last.begin == part.position:
            found[-1] = StockedPart(last.begin, part.end, last.position)
        else:
            found.append(part)
    return found
