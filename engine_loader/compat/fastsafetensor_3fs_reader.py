"""The interface of the package ``fastsafetensor_3fs_reader`` (0.3.3), over this package's reader: a drop-in for it.

fastsafetensors' own 3FS loader runs on it by ``install()``, or as a copier by ``register_copier()``. Unlike the
published package, many reads are in flight at once, a reader may be used from several threads, and a read that fails
is an exception with file, offset and cause.
"""

from __future__ import annotations

import logging
import os
import sys
from abc import ABC, abstractmethod
from typing import Any

from ..errors import CheckpointError, SettingsError
from ..settings import LoaderSettings, load_settings
from ..sources.posix import PosixSource
from ..sources.source import Source
from ..sources.threefs.discovery import find_client
from ..sources.threefs.discovery import is_available as _is_available
from ..sources.threefs.shared_library import ThreeFsError, find_library
from ..sources.threefs.threefs_source import ThreeFsOptions, ThreeFsSource
from ..transfer.constructor import make_readers
from .address_reader import AddressReader

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


class ThreeFSFileReader(AddressReader, FileReaderInterface):
    """Reads files on 3FS by USRBIO.

    Args:
        mount_point: the mount that the files are on.
        entries: at most half as many reads are in flight on one ring.
        io_depth: accepted, at most ``entries``; it changes nothing, since the rings complete reads one by one.
        buffer_size: bytes of shared memory for reads in flight.
        backend: "cpp" (native threads), "python", or "auto": what FASTSAFETENSORS_BACKEND says, else the first that
            is available.

    Raises:
        CheckpointError: no library was found, or ``mount_point`` is no directory.
        ValueError: ``entries`` is below 2 or ``io_depth`` above ``entries``.
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
            source = ThreeFsSource(_fit(ThreeFsOptions.from_settings(settings), entries, buffer_size))
            if not os.path.isdir(mount_point):
                raise CheckpointError("there is no such directory", file=mount_point, hint="where is 3FS mounted?")
        super().__init__(source, settings)
        self.mount_point = mount_point


class MockFileReader(AddressReader, FileReaderInterface):
    """Reads ordinary files through the kernel, for tests: nothing of 3FS is needed."""

    def __init__(self, mount_point: str = "", **_: Any) -> None:
        super().__init__(PosixSource(), _settings("auto"))
        self.mount_point = mount_point


def create_reader(backend: str = "auto", **options: Any) -> FileReaderInterface:
    """A reader of the given backend; ``options`` go to its constructor.

    Raises:
        ValueError: there is no such backend.
        CheckpointError: it is not available; only "auto" falls back to the mock, and logs a warning.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is invalid. Valid values: {', '.join(_BACKENDS)}")
    chosen = get_backend() if backend == "auto" else backend
    if chosen == "mock":
        if backend == "auto" and _forced() is None:
            logger.warning("3FS is not available, so ordinary reads stand in for it (backend mock)")
        return MockFileReader(**options)
    return ThreeFSFileReader(backend=chosen, **options)


def get_backend() -> str:
    """What "auto" means: FASTSAFETENSORS_BACKEND, else the first of "cpp", "python" and "mock" that is available."""
    forced = _forced()
    if forced is not None:
        return forced
    try:
        client = find_client(load_settings().settings.loader.hf3fs_lib_dir)
    except ThreeFsError:
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
    except ThreeFsError:
        return ""
    if not os.path.exists(path):
        return ""
    return client.binding.extract_mount_point(os.fspath(path)) or ""


def install() -> None:
    """Let ``import fastsafetensor_3fs_reader`` find this module instead of the published package."""
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


def _fit(options: ThreeFsOptions, entries: int, buffer_size: int) -> ThreeFsOptions:
    """Options whose reads in flight fit into ``buffer_size``: as large as leaves at least _IN_FLIGHT of them a ring."""
    io_bytes = _LARGEST_IO_BYTES
    while io_bytes > _SMALLEST_IO_BYTES and _RINGS * _IN_FLIGHT * io_bytes * 5 // 4 > buffer_size:
        io_bytes //= 2
    depth = max(1, min(entries // 2, buffer_size * 4 // 5 // io_bytes // _RINGS))
    return ThreeFsOptions(_RINGS, depth, io_bytes, options.deadline_s, options.lib_dir)
