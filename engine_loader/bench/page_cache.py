"""Fills the kernel's page cache with files, drops files from it, and says which share of files it holds."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..transfer import modes

_CHUNK_BYTES = 8 << 20


def drop(paths: Iterable[str]) -> None:
    """Ask the kernel to drop the files' pages (POSIX_FADV_DONTNEED); pages that a process has mapped stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Pages that are not written to the disk yet cannot be dropped.
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm(paths: Iterable[str]) -> None:
    """Read the files once, so that the page cache holds them if there is enough memory."""
    buffer = bytearray(_CHUNK_BYTES)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def resident_share(paths: Iterable[str]) -> float:
    """The share (0 to 1) of the files that the page cache holds, by samples; 0 if the kernel does not report it."""
    held = total = 0.0
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            held += size * (modes.resident_share(file.fileno(), size) or 0.0)
            total += size
    return held / max(1.0, total)
