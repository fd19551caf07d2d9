"""Reads bytes of files to addresses over a source and reader threads: what the drop-in readers have in common."""

from __future__ import annotations

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np

from ..formats.safetensors import LENGTH_BYTES, header_length, parse_header
from ..settings import LoaderSettings
from ..sources.source import Source, SourceFile
from ..transfer.constructor import make_readers
from ..transfer.device_copy import DeviceWriter, is_device_pointer
from ..transfer.plan import extent, make_extents
from ..transfer.protocol import ReaderThreads, Transfer, wait_or_cancel

_DISCARD_BYTES = 64 << 20
# One read gets the length of a header and, mostly, all of it.
_FIRST_READ_BYTES = 128 << 10
_DEVICE_PART_BYTES = 32 << 20


class AddressReader:
    """Reads bytes of files to host or device memory that is named by its address. Several threads may use it.

    Files are opened when they are first read, and stay open until ``close``. The threads and rings that read are made
    anew in a forked child.

    Args:
        source: where files are opened.
        settings: of the reader threads.
    """

    def __init__(self, source: Source, settings: LoaderSettings) -> None:
        self._source = source
        self._settings = settings
        self._files: dict[str, SourceFile] = {}
        self._readers: ReaderThreads | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def read_chunked(
        self,
        path: str,
        dev_ptr: int,
        file_offset: int,
        total_length: int,
        chunk_size: int = 0,
        pipelined: bool = False,
    ) -> int:
        """Read bytes of a file into memory; returns how many there were, fewer only at the end of the file.

        Args:
            path: the file.
            dev_ptr: address of host or CUDA memory; 0 reads and throws away.
            file_offset, total_length: in bytes.
            chunk_size, pipelined: not needed: the reader threads cut and pipeline reads to suit the storage.

        Raises:
            CheckpointError: the file cannot be opened, or not all of these bytes could be read.
            ValueError: an offset or a length is negative.
        """
        if file_offset < 0 or total_length < 0:
            raise ValueError(f"file_offset and total_length must not be negative, not {file_offset} and {total_length}")
        file = self._open(os.fspath(path))
        length = min(total_length, max(0, file.size - file_offset))
        if length == 0:
            return 0
        if dev_ptr == 0:
            self._discard(file, file_offset, length)
        elif is_device_pointer(dev_ptr):
            self._to_device(file, file_offset, length, dev_ptr)
        else:
            wait_or_cancel(self._start(file, file_offset, length, dev_ptr, None))
        return length

    def read_headers_batch(self, paths: list[str], num_threads: int = 8) -> dict[str, tuple[str, int, int]]:
        """Read safetensors headers, ``num_threads`` at a time.

        Returns:
            path -> (header as JSON text, 8 + length of the header in bytes, size of the file in bytes).

        Raises:
            CheckpointError: a file cannot be opened, or its header is wrong.
        """
        if not paths:
            return {}
        with ThreadPoolExecutor(max(1, min(num_threads, len(paths)))) as threads:
            return dict(zip(paths, threads.map(self._header, paths), strict=True))

    def has_fd(self, path: str) -> bool:
        """Whether a file is open: it was read, or its header was, and ``close`` was not called since."""
        with self._lock:
            return os.fspath(path) in self._files

    def close(self) -> None:
        """Give back files, rings and threads. Safe to call twice."""
        with self._lock:
            readers, self._readers = self._readers, None
            files, self._files = list(self._files.values()), {}
        if readers is not None:
            readers.close()
        for file in files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: str) -> SourceFile:
        with self._lock:
            found = self._files.get(path)
        if found is not None:
            return found
        opened = self._source.open(path)
        with self._lock:
            found = self._files.setdefault(path, opened)
        if found is not opened:  # another thread opened it first
            opened.close()
        return found

    def _start(self, file: SourceFile, offset: int, length: int, address: int, owner: object) -> Transfer:
        """Start a read to an address; ``owner`` keeps the memory there alive, None: the caller does."""
        plan = make_extents([extent(0, offset, length, address)])
        return self._running_readers().submit([file], plan, owner=owner)

    def _running_readers(self) -> ReaderThreads:
        with self._lock:
            if self._pid != os.getpid():  # threads and rings stayed with the parent
                self._readers, self._pid = None, os.getpid()
            if self._readers is None:
                descriptors = all(file.fileno() is not None for file in self._files.values())
                self._readers = make_readers(self._settings, descriptors=descriptors)
            return self._readers

    def _discard(self, file: SourceFile, offset: int, length: int) -> None:
        memory = np.frombuffer(mmap.mmap(-1, min(length, _DISCARD_BYTES)), np.uint8)  # unmapped with its last reference
        for start in range(0, length, len(memory)):
            part = min(len(memory), length - start)
            wait_or_cancel(self._start(file, offset + start, part, memory.ctypes.data, memory))

    def _to_device(self, file: SourceFile, offset: int, length: int, address: int) -> None:
        writer = DeviceWriter(address, min(length, _DEVICE_PART_BYTES))
        try:
            writer.write(length, lambda start, part, to, owner: self._start(file, offset + start, part, to, owner))
        finally:
            writer.close()

    def _header(self, path: str) -> tuple[str, int, int]:
        file = self._open(path)
        first = self._bytes(file, 0, min(file.size, _FIRST_READ_BYTES))
        end = LENGTH_BYTES + header_length(first, file.size, file.path)
        if end > len(first):
            first += self._bytes(file, len(first), end - len(first))
        header = first[LENGTH_BYTES:end]
        parse_header(header, file.size, file.path)
        return header.decode(), end, file.size

    def _bytes(self, file: SourceFile, offset: int, length: int) -> bytes:
        buffer = np.empty(length, np.uint8)
        if length:
            wait_or_cancel(self._start(file, offset, length, buffer.ctypes.data, buffer))
        return buffer.tobytes()
