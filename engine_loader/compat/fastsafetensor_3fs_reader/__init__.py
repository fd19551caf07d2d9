"""The interface of the package ``fastsafetensor_3fs_reader`` (0.3.3), over this package's reader: a drop-in for it.

fastsafetensors' own 3FS loader runs on it by ``install()``, or as a copier by ``register_copier()``. Unlike the
published package, many reads are in flight at once, a reader may be used from several threads, and a read that fails
is an exception with file, offset and cause.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from . import interface, mock, reader_cpp, reader_py
from .backends import (
    BACKENDS,
    extract_mount_point,
    forced_backend,
    get_backend,
    get_hf3fs_lib_path,
    is_available,
)
from .interface import FileReaderInterface
from .mock import MockFileReader
from .threefs_reader import ThreeFSFileReader

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

_PUBLISHED = "fastsafetensor_3fs_reader"


def create_reader(backend: str = "auto", **options: Any) -> FileReaderInterface:
    """A reader of the given backend; ``options`` go to its constructor.

    Raises:
        ValueError: there is no such backend.
        CheckpointError: it is not available; only "auto" falls back to the mock, and logs a warning.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is invalid. Valid values: {', '.join(BACKENDS)}")
    chosen = get_backend() if backend == "auto" else backend
    if chosen == "mock":
        if backend == "auto" and forced_backend() is None:
            logger.warning("3FS is not available, so ordinary reads stand in for it (backend mock)")
        return MockFileReader(**options)
    return ThreeFSFileReader(backend=chosen, **options)


def install() -> None:
    """Let ``import fastsafetensor_3fs_reader``, and its public modules, find this package instead of the published
    one."""
    sys.modules[_PUBLISHED] = sys.modules[__name__]
    for module in (interface, mock, reader_cpp, reader_py):
        sys.modules[f"{_PUBLISHED}.{module.__name__.rpartition('.')[2]}"] = module


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
