"""The interface of the package ``fastsafetensor_3fs_reader``, over this package's reader: a drop-in for it.

The names and meanings are the published ones (0.3.3), so fastsafetensors' own 3FS loader runs on it, by ``install()``,
or as a copier, by ``register_copier()``. Unlike there, many reads are in flight at once, a reader may be used from
several threads, and what cannot be read is an exception with file, offset and cause.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from .errors import CheckpointError, SettingsError
from .formats.safetensors import LENGTH_BYTES, header_length, parse_header
from .settings import LoaderSettings, load_settings
from .sources.posix import PosixSource
from .sources.registry import usrbio_options
from .sources.source import Source, SourceFile
from .sources.threefs.library import Hf3fsError, find_library
from .sources.threefs.source import UsrbioOptions, UsrbioSource, find_client
from .sources.threefs.source import is_available as _is_available
from .transfer.constructor import make_readers
from .transfer.device_copy import DeviceWriter, is_device_pointer
from .transfer.plan import extent, make_extents
from .transfer.protocol import ReaderThreads, Transfer

__all__ = [
    "FileReaderInterface",
    "MockFileReader",
    "ThreeFSFileReader",
    "create_reader",
    "extract_mount_point",
    "get_backend",
    "get_hf3fs_lib_path",
    "install",
    "is_available",
    "register_copier",
]

logger = logging.getLogger(__name__)

_BACKENDS = ("cpp", "python", "mock", "auto")
_PUBLISHED = "fastsafetensor_3fs_reader"
_RINGS = 2
_LARGEST_IO_BYTES, _SMALLEST_IO_BYTES = 4 << 20, 256 << 10
_IN_FLIGHT = 16
_DISCARD_BYTES = 64 << 20
# One read gets the length of a header and, mostly, all of it.
_FIRST_READ_BYTES = 128 << 10
_DEVICE_PART_BYTES = 32 << 20


class FileReaderInterface(ABC):
    """What a reader does. Files are opened when they are first asked for, and stay open until ``close``."""

    @abstractmethod
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
            file_offset: in bytes.
            total_length: in bytes.
            chunk_size: a hint that is not needed: reads are cut to suit the storage.
            pipelined: accepted; reads are always pipelined.

        Raises:
            CheckpointError: the file cannot be opened, or not all of these bytes could be read.
        """

    @abstractmethod
    def read_headers_batch(self, paths: list[str], num_threads: int = 8) -> dict[str, tuple[str, int, int]]:
        """Read safetensors headers, ``num_threads`` at a time.

        Returns:
            path -> (header as JSON text, 8 + length of the header in bytes, size of the file in bytes).

        Raises:
            CheckpointError: a file cannot be opened, or its header is wrong.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back files, rings and threads. Safe to call twice."""


class _TransferReader(FileReaderInterface):
    """A reader over a source and reader threads."""

    def __init__(self, mount_point: str, source: Source, settings: LoaderSettings) -> None:
        self.mount_point = mount_point
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
            self._start(file, file_offset, length, dev_ptr).wait()
        return length

    def read_headers_batch(self, paths: list[str], num_threads: int = 8) -> dict[str, tuple[str, int, int]]:
        if not paths:
            return {}
        with ThreadPoolExecutor(max(1, min(num_threads, len(paths)))) as threads:
            return dict(zip(paths, threads.map(self._header, paths), strict=True))

    def has_fd(self, path: str) -> bool:
        """Whether a file is open."""
        with self._lock:
            return path in self._files

    def close(self) -> None:
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
        if found is not opened:  # another thread was faster
            opened.close()
        return found

    def _start(self, file: SourceFile, offset: int, length: int, address: int) -> Transfer:
        plan = make_extents([extent(0, offset, length, address)])
        return self._running_readers().submit([file], plan)

    def _running_readers(self) -> ReaderThreads:
        with self._lock:
            if self._pid != os.getpid():  # threads and rings stayed with the parent
                self._readers, self._pid = None, os.getpid()
            if self._readers is None:
                descriptors = all(file.fileno() is not None for file in self._files.values())
                self._readers = make_readers(self._settings, descriptors=descriptors)
            return self._readers

    def _discard(self, file: SourceFile, offset: int, length: int) -> None:
        with mmap.mmap(-1, min(length, _DISCARD_BYTES)) as memory:
            view = np.frombuffer(memory, np.uint8)
            try:
                for start in range(0, length, len(view)):
                    part = min(len(view), length - start)
                    self._start(file, offset + start, part, view.ctypes.data).wait()
            finally:
                del view

    def _to_device(self, file: SourceFile, offset: int, length: int, address: int) -> None:
        writer = DeviceWriter(address, min(length, _DEVICE_PART_BYTES))
        try:
            writer.write(length, lambda start, part, to: self._start(file, offset + start, part, to).wait)
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
            self._start(file, offset, length, buffer.ctypes.data).wait()
        return buffer.tobytes()


class ThreeFSFileReader(_TransferReader):
    """Reads files on 3FS by USRBIO.

    Args:
        mount_point: the mount that the files are on.
        entries: at most half as many reads are in flight on one ring.
        io_depth: accepted for its place; reads complete one by one, which is what the ring is made for here.
        buffer_size: bytes of shared memory for reads in flight.
        backend: "cpp" (native threads), "python", or "auto": what FASTSAFETENSORS_BACKEND says, else the first that
            is there.

    Raises:
        CheckpointError: there is no library, or nothing is mounted at ``mount_point``.
    """

    def __init__(
        self,
        mount_point: str,
        entries: int = 64,
        io_depth: int = 0,
        buffer_size: int = 64 << 20,
        *,
        backend: str = "auto",
    ) -> None:
        if entries < 2 or io_depth > entries:
            raise ValueError(f"entries must be at least 2 and io_depth at most entries, not {entries} and {io_depth}")
        settings = _settings(_chosen(backend))
        source: Source = PosixSource()
        if settings.engine != "mock":
            source = UsrbioSource(_fit(usrbio_options(settings), entries, buffer_size))
            if not os.path.isdir(mount_point):
                raise CheckpointError("there is no such directory", file=mount_point, hint="where is 3FS mounted?")
        super().__init__(mount_point, source, settings)


class MockFileReader(_TransferReader):
    """The same over ordinary files, for tests: nothing of 3FS is needed."""

    def __init__(self, mount_point: str = "", **_: Any) -> None:
        super().__init__(mount_point, PosixSource(), _settings("auto"))


def create_reader(backend: str = "auto", **options: Any) -> FileReaderInterface:
    """A reader of the given backend; ``options`` go to its constructor.

    Raises:
        ValueError: there is no such backend.
        CheckpointError: it cannot be had; only "auto" falls back to the mock, and says so.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is invalid. Valid values: {', '.join(_BACKENDS)}")
    chosen = get_backend() if backend == "auto" else backend
    if chosen == "mock":
        if backend == "auto" and _forced() is None:
            logger.warning("3FS cannot be had, so ordinary reads stand in for it (backend mock)")
        return MockFileReader(**options)
    return ThreeFSFileReader(backend=chosen, **options)


def get_backend() -> str:
    """What "auto" stands for here: FASTSAFETENSORS_BACKEND, else "cpp", "python" or "mock", the first that is there."""
    forced = _forced()
    if forced is not None:
        return forced
    try:
        client = find_client(load_settings().settings.loader.hf3fs_lib_dir)
    except Hf3fsError:
        return "mock"
    if client.library is None:
        return "python"
    readers = make_readers(LoaderSettings(engine="auto"))
    readers.close()
    return readers.name


def is_available() -> bool:
    """Whether a read by USRBIO would work: the library loads, and 3FS is mounted and complete."""
    return get_backend() != "mock" and _is_available(lib_dir=load_settings().settings.loader.hf3fs_lib_dir)


def get_hf3fs_lib_path() -> str | None:
    """The 3FS library that is used, or None."""
    found = find_library(load_settings().settings.loader.hf3fs_lib_dir).path
    return None if found is None else str(found)


def extract_mount_point(path: str) -> str:
    """The 3FS mount that ``path`` is on; empty where it is on none."""
    try:
        client = find_client(load_settings().settings.loader.hf3fs_lib_dir)
    except Hf3fsError:
        return ""
    if not os.path.exists(path):
        return ""
    return client.binding.extract_mount_point(os.fspath(path)) or ""


def install() -> None:
    """Let ``import fastsafetensor_3fs_reader`` find this module in the place of the published package."""
    sys.modules[_PUBLISHED] = sys.modules[__name__]


def register_copier(name: str = "3fs") -> None:
    """Register this reader with fastsafetensors (0.5) as the copier ``name``; "3fs" replaces its own."""
    from fastsafetensors.copier.registry import register_copier_constructor
    from fastsafetensors.copier.threefs import ThreeFSFileCopier

    def make_constructor(device: Any, mount_point: str, *args: Any, **options: Any) -> Any:
        known = {key: options[key] for key in ("entries", "io_depth", "buffer_size") if key in options}
        reader = ThreeFSFileReader(mount_point, **known)

        def construct(metadata: Any, device: Any, framework: Any) -> Any:
            return ThreeFSFileCopier(metadata, device, reader, framework)

        construct.reader = reader  # type: ignore[attr-defined]
        return construct

    register_copier_constructor(name, ThreeFSFileCopier)(make_constructor)


def _forced() -> str | None:
    forced = os.environ.get("FASTSAFETENSORS_BACKEND", "").strip().lower()
    if forced and forced not in _BACKENDS:
        raise SettingsError(f"FASTSAFETENSORS_BACKEND={forced!r}: it is one of {', '.join(_BACKENDS)}")
    return forced if forced and forced != "auto" else None


def _chosen(backend: str) -> str:
    return (_forced() or "auto") if backend == "auto" else backend


def _settings(engine: str) -> LoaderSettings:
    return load_settings({"engine": engine}).settings.loader


def _fit(options: UsrbioOptions, entries: int, buffer_size: int) -> UsrbioOptions:
    """Reads in flight that fit into the buffer: large ones, but not so large that there are too few."""
    io_bytes = _LARGEST_IO_BYTES
    while io_bytes > _SMALLEST_IO_BYTES and _RINGS * _IN_FLIGHT * io_bytes * 5 // 4 > buffer_size:
        io_bytes //= 2
    depth = max(1, min(entries // 2, buffer_size * 4 // 5 // io_bytes // _RINGS))
    return UsrbioOptions(_RINGS, depth, io_bytes, options.deadline_s, options.lib_dir)
