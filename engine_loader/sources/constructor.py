"""Picks the source for a path."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import CheckpointError
from .memory import MemorySource
from .posix import PosixSource
from .protocol import Source


def make_source(backend: str, files: Mapping[str, bytes | bytearray | memoryview] | None = None) -> Source:
    """The source that ``backend`` names; "auto" is posix.

    Args:
        backend: auto, posix or memory.
        files: what the memory source holds: path -> content.

    Raises:
        CheckpointError: the backend is not one of these, or ``files`` does not go with it.
    """
    if files is not None and backend not in ("memory", "auto"):
        raise CheckpointError(f"files= goes with backend='memory', not with {backend!r}")
    if backend == "memory" or files is not None:
        return MemorySource(files or {})
    if backend in ("auto", "posix"):
        return PosixSource()
    raise CheckpointError(f"there is no backend {backend!r}", hint="auto, posix or memory")
