"""Picks the source for a path."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import CheckpointError
from ..settings import LoaderSettings
from .memory import MemorySource
from .posix import PosixSource
from .protocol import Source
from .usrbio import UsrbioOptions, UsrbioSource


def make_source(
    backend: str,
    files: Mapping[str, bytes | bytearray | memoryview] | None = None,
    settings: LoaderSettings | None = None,
) -> Source:
    """The source that ``backend`` names; "auto" is usrbio for files on 3FS, else posix.

    Args:
        backend: auto, posix, usrbio or memory.
        files: what the memory source holds: path -> content.
        settings: how files on 3FS are read.

    Raises:
        CheckpointError: the backend is not one of these or cannot be had, or ``files`` does not go with it.
    """
    if files is not None and backend not in ("memory", "auto"):
        raise CheckpointError(f"files= goes with backend='memory', not with {backend!r}")
    if backend == "memory" or files is not None:
        return MemorySource(files or {})
    if backend == "posix":
        return PosixSource()
    if backend in ("auto", "usrbio"):
        return UsrbioSource(usrbio_options(settings or LoaderSettings()), fallback=backend == "auto")
    raise CheckpointError(f"there is no backend {backend!r}", hint="auto, posix, usrbio or memory")


def usrbio_options(settings: LoaderSettings) -> UsrbioOptions:
    """The settings for reading by USRBIO."""
    return UsrbioOptions(
        rings=settings.usrbio_rings,
        depth=settings.usrbio_depth,
        io_bytes=int(settings.io_bytes),
        deadline_s=settings.usrbio_deadline_s,
        lib_dir=settings.hf3fs_lib_dir,
    )
