"""Packs that are open while their frames are read."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from ..packs.manifest import Frame
from ..packs.pack import Pack, open_pack
from ..stores.interface import Readable, Store


class PackReaders:
    """Opens each pack for its first frame, and closes it behind its last. For use by several threads: as many packs
    are open as there are threads, at most, when frames come pack by pack.

    Args:
        frames: (pack, frame) of everything that will be read.
    """

    def __init__(self, store: Store, frames: Iterable[tuple[Pack, Frame]]) -> None:
        self._packs: dict[str, _Pack] = {}
        for pack, frame in frames:
            self._packs.setdefault(pack.stored.name, _Pack(store, pack)).frames.append(frame)

    def __enter__(self) -> PackReaders:
        return self

    def __exit__(self, *_: object) -> None:
        for pack in self._packs.values():
            pack.close()

    @contextmanager
    def reader(self, name: str) -> Iterator[Readable]:
        """The pack, opened, for reading one of its frames."""
        pack = self._packs[name]
        try:
            yield pack
        finally:
            pack.count_frame()


class _Pack:
    """One pack; read as a ``Readable`` that opens itself, and once again where the server has lost its handle."""

    def __init__(self, store: Store, pack: Pack) -> None:
        self.size = 0  # known when it is open
        self.frames: list[Frame] = []
        self._store = store
        self._pack = pack
        self._done = 0
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._opened: Readable | None = None

    def expect(self, ranges: object) -> None:
        return  # ``_open`` says it

    def read(self, offset: int, size: int) -> bytes:
        opened = self._open()
        try:
            return opened.read(offset, size)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return self._open(stale=opened).read(offset, size)

    def count_frame(self) -> None:
        """Count a frame as read; close the pack behind the last."""
        with self._lock:
            self._done += 1
            if self._done == len(self.frames):
                self._stack.close()

    def close(self) -> None:
        with self._lock:
            self._stack.close()

    def _open(self, stale: Readable | None = None) -> Readable:
        with self._lock:
            if self._opened is None or self._opened is stale:
                self._opened = self._stack.enter_context(open_pack(self._store, self._pack))
                self.size = self._opened.size
                self._opened.expect([(frame.offset, frame.size) for frame in self.frames])
            return self._opened
