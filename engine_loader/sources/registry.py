"""Picks the source for a path."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import CheckpointError
from ..settings import LoaderSettings
from .memory import MemorySource
from .object_store.client import ObjectStoreOptions
from .object_store.object_source import ObjectStoreSource
from .object_store.url import is_object_url
from .posix import PosixSource
from .source import Source, SourceFile
from .threefs.threefs_source import ThreeFsOptions, ThreeFsSource


def make_source(
    backend: str,
    files: Mapping[str, bytes | bytearray | memoryview] | None = None,
    settings: LoaderSettings | None = None,
) -> Source:
    """The source that ``backend`` names; "auto" is object_store for URLs, usrbio for files on 3FS, else posix.

    Args:
        backend: auto, posix, usrbio, object_store or memory.
        files: what the memory source holds: path -> content.
        settings: how files on 3FS and objects are read.

    Raises:
        CheckpointError: the backend is not one of these or cannot be had, or ``files`` does not go with it.
    """
    if files is not None and backend not in ("memory", "auto"):
        raise CheckpointError(f"files= goes with backend='memory', not with {backend!r}")
    if backend == "memory" or files is not None:
        return MemorySource(files or {})
    if backend == "posix":
        return PosixSource()
    settings = settings or LoaderSettings()
    if backend == "object_store":
        return ObjectStoreSource(object_store_options(settings))
    if backend == "usrbio":
        return ThreeFsSource(usrbio_options(settings))
    if backend == "auto":
        return AutoSource(settings)
    raise CheckpointError(f"there is no backend {backend!r}", hint="auto, posix, usrbio, object_store or memory")


class AutoSource:
    """Objects for URLs of object stores, files for all other paths.

    Attributes:
        name: of the source that was asked last.
    """

    def __init__(self, settings: LoaderSettings) -> None:
        self._files = ThreeFsSource(usrbio_options(settings), fallback=True)
        self._objects = ObjectStoreSource(object_store_options(settings))
        self.name = self._files.name

    def open(self, path: str) -> SourceFile:
        source = self._source(path)
        file = source.open(path)
        self.name = source.name
        return file

    def is_dir(self, path: str) -> bool:
        return self._source(path).is_dir(path)

    def list(self, path: str) -> list[str]:
        return self._source(path).list(path)

    def _source(self, path: str) -> Source:
        return self._objects if is_object_url(path) else self._files


def object_store_options(settings: LoaderSettings) -> ObjectStoreOptions:
    """The settings for reading objects."""
    return ObjectStoreOptions(
        range_bytes=int(settings.object_store_range_bytes),
        timeout_s=settings.object_store_timeout_s,
        max_tries=settings.max_tries,
        endpoint_url=settings.object_store_endpoint_url,
        region=settings.object_store_region,
        anonymous=settings.object_store_anonymous,
        virtual_host=settings.object_store_virtual_host,
    )


def usrbio_options(settings: LoaderSettings) -> ThreeFsOptions:
    """The settings for reading by USRBIO."""
    return ThreeFsOptions(
        rings=settings.usrbio_rings,
        depth=settings.usrbio_depth,
        io_bytes=int(settings.io_bytes),
        deadline_s=settings.usrbio_deadline_s,
        lib_dir=settings.hf3fs_lib_dir,
    )
