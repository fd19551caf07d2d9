"""Files of which a part lies in this machine's memory: a process has read it before a loader asked (see ahead/).

What is in the stock is taken from there, by reader threads (transfer/stocked.py) and by reads of headers; the rest
comes from the file. A part counts only for the very file that it was read from, as ``SourceFile.identity`` tells.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from .kept.kept_version import MOST_BUFFERS, first_bytes
from .source import Source, SourceFile, UsrbioAccess


@dataclass(frozen=True)
class StockedPart:
    """Bytes of a file in the stock.

    Attributes:
        begin: where in the file they begin.
        end: where in the file they end.
        position: where in the stock's memory they begin.
    """

    begin: int
    end: int
    position: int


class Stock:
    """What was read ahead of a loader: memory that is shared with the process that filled it, to be read only.

    The memory is given back when this is closed, or when nothing refers to it any more.

    Args:
        descriptor: of the memory; this object closes it.
        parts: identity of a file -> what of it is there.
        connection: to the process that filled it; it is closed with this, which tells the process so.

    Attributes:
        memory: the memory as an open file.
        size: bytes of all parts.
    """

    def __init__(
        self,
        descriptor: int,
        parts: Mapping[str, Sequence[StockedPart]],
        connection: socket.socket | None = None,
    ) -> None:
        self.memory = StockMemory(descriptor)
        self.size = sum(part.end - part.begin for found in parts.values() for part in found)
        self._parts = parts
        self._connection = connection

    def parts_of(self, file: SourceFile) -> Sequence[StockedPart]:
        """What of an open file is there."""
        identity = file.identity()
        return self._parts.get(identity, ()) if identity is not None else ()

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        self.memory.close()
        if self._connection is not None:
            self._connection.close()


class StockMemory:
    """A stock's memory as a source file: reader threads read it by its descriptor.

    Args:
        descriptor: of the memory, which is closed with this.
    """

    path = "the weights that were read ahead"
    source = "memory"
    remote = False
    mappable = False
    native_access: UsrbioAccess | None = None

    def __init__(self, descriptor: int) -> None:
        self._file = io.FileIO(descriptor)  # closes it, too, when it is garbage collected
        self.size = os.fstat(descriptor).st_size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        return os.preadv(self._file.fileno(), buffers[:MOST_BUFFERS], offset)

    def fileno(self) -> int | None:
        return None if self._file.closed else self._file.fileno()

    def identity(self) -> str | None:
        return None

    def verify_unchanged(self) -> None:
        return

    def close(self) -> None:
        self._file.close()


class StockedFile:
    """An open file of which a part is in a stock.

    Args:
        file: which is closed with this.
        stock: where the part is.
        parts: what of it is there, in the order of the file; no two overlap.

    Attributes:
        stock: as given; None once it is closed.
        parts: as given.
    """

    def __init__(self, file: SourceFile, stock: Stock, parts: Sequence[StockedPart]) -> None:
        self.path, self.source, self.size = file.path, file.source, file.size
        self.remote, self.mappable, self.native_access = file.remote, file.mappable, file.native_access
        self.stock: Stock | None = stock
        self.parts = parts
        self._file = file

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        stock = self.stock
        part = next((part for part in self.parts if part.begin <= offset < part.end), None)
        if stock is not None and part is not None:
            with suppress(OSError, ValueError):  # it was closed: the file has them, too
                here = first_bytes(buffers, part.end - offset)
                done = stock.memory.read_into(part.position + offset - part.begin, here)
                if done:
                    return done
        return self._file.read_into(offset, buffers)

    def fileno(self) -> int | None:
        return self._file.fileno()

    def identity(self) -> str | None:
        return self._file.identity()

    def verify_unchanged(self) -> None:
        self._file.verify_unchanged()

    def close(self) -> None:
        self.stock = None
        self._file.close()


class StockedSource:
    """A source of whose files a part may be in a stock.

    Args:
        source: that opens them.
        stock: what is there.

    Attributes:
        name: of the source that opened the last file.
    """

    def __init__(self, source: Source, stock: Stock) -> None:
        self.name = source.name
        self._source = source
        self._stock = stock

    def open(self, path: str) -> SourceFile:
        file = self._source.open(path)
        self.name = self._source.name
        parts = self._stock.parts_of(file)
        return StockedFile(file, self._stock, parts) if parts else file

    def is_dir(self, path: str) -> bool:
        return self._source.is_dir(path)

    def list(self, path: str) -> list[str]:
        return self._source.list(path)

    def folders(self, path: str) -> Sequence[str]:
        return self._source.folders(path)
