"""The reader of files on 3FS by native threads, whatever FASTSAFETENSORS_BACKEND says."""

from __future__ import annotations

from typing import Any

from .backends import threefs_is_found
from .threefs_reader import ThreeFSFileReader

__all__ = ["ThreeFSFileReaderCpp", "check_library"]


class ThreeFSFileReaderCpp(ThreeFSFileReader):
    """``ThreeFSFileReader`` with ``backend="cpp"``."""

    def __init__(
        self, mount_point: str, entries: int = 64, io_depth: int = 0, buffer_size: int = 64 << 20, **unused: Any
    ) -> None:
        super().__init__(mount_point, entries, io_depth, buffer_size, backend="cpp", **unused)


def check_library() -> bool:
    """Whether 3FS's library, or its Python binding, is found and can be loaded."""
    return threefs_is_found()
