"""A file of any source as a Python stream, for code that calls ``read`` and ``seek``."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..failures import RETRYABLE, io_error
from .source import Source, SourceFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_TRIES = 5


@contextmanager
def open_stream(source: Source, path: str, buffer_bytes: int = io.DEFAULT_BUFFER_SIZE) -> Iterator[io.BufferedReader]:
    """Open a file for reading; each read of the source asks for at least ``buffer_bytes``.

    Raises:
        CheckpointError: as ``Source.open``; and from reads, that a byte cannot be read.
    """
    file = source.open(path)
    try:
        yield io.BufferedReader(_Raw(file), max(1, min(buffer_bytes, file.size)))
    finally:
        file.close()


class _Raw(io.RawIOBase):
    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        if begin + offset < 0:
            raise ValueError(f"there is no byte {begin + offset}")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        for tried in range(1, _TRIES + 1):
            try:
                got = self._file.read_into(self._position, [memoryview(buffer).cast("B")])
            except CheckpointError:  # told already; it may be an OSError, too
                raise
            except OSError as error:
                if error.errno not in RETRYABLE or tried == _TRIES:
                    raise io_error(self._file.path, self._position, error.errno, tries=tried) from error
            else:
                break
        self._position += got
        return got
