"""Open files as native reader threads take them: how each is read, and its descriptors."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from ...errors import TransferError
from ...sources.source import SourceFile
from ..modes import ReadMode
from .library import FILE_REMOTE, FILE_WIDE, MODES, File


@dataclass(eq=False)
class OpenFile:
    """How a file is read, with a descriptor of its own for O_DIRECT, which goes with it."""

    mode: ReadMode
    direct_fd: int
    flags: int

    def __del__(self) -> None:
        if self.direct_fd >= 0:
            os.close(self.direct_fd)


def flags_of(mode: ReadMode) -> int:
    """The library's flags of a file that is read in this way."""
    return (FILE_WIDE if mode.wide else 0) | (FILE_REMOTE if mode.remote else 0)


def native_file(file: SourceFile, opened: OpenFile) -> File:
    """A file as the library takes it.

    Raises:
        TransferError: it was closed.
    """
    fd = file.fileno()
    if fd is None:
        raise TransferError("the file was closed before it was read", file=file.path)
    return File(fd=fd, direct_fd=opened.direct_fd, size=file.size, mode=MODES[opened.mode.name], flags=opened.flags)


def open_direct(file: SourceFile) -> int:
    """The same file with O_DIRECT, or -1 where that is refused: then it is read buffered."""
    # By the descriptor, so that it is the same file even if another took its name.
    with contextlib.suppress(OSError):
        return os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    return -1
