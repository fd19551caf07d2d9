"""What the native library is told of an open file, asked once for each."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass

from ...errors import TransferError
from ...sources.source import SourceFile
from ..modes import ReadMode
from .library import FILE_REMOTE, FILE_WIDE, MODES, OK, File


@dataclass(eq=False)
class OpenFile:
    """How a file is read.

    Attributes:
        mode: the way to read it.
        flags: of the library.
        direct_fd: a descriptor of its own for O_DIRECT, which goes with this object; -1: there is none.
        direct_offset: what O_DIRECT wants offsets to be multiples of, in bytes; 0: not known.
        direct_memory: the same for addresses in memory.
    """

    mode: ReadMode
    flags: int
    direct_fd: int = -1
    direct_offset: int = 0
    direct_memory: int = 0

    def __del__(self) -> None:
        if self.direct_fd >= 0:
            os.close(self.direct_fd)


def open_file(file: SourceFile, mode: ReadMode, library: ctypes.CDLL) -> OpenFile:
    """Open a file anew where it is read around the page cache, and ask what that takes."""
    opened = OpenFile(mode, (FILE_WIDE if mode.wide else 0) | (FILE_REMOTE if mode.remote else 0))
    fd = -1 if mode.name == "buffered" else _open_direct(file)
    if fd < 0:
        return opened
    offset, memory = ctypes.c_uint32(), ctypes.c_uint32()
    if library.el_direct_limits(fd, offset, memory) == OK:
        opened.direct_fd, opened.direct_offset, opened.direct_memory = fd, offset.value, memory.value
    else:
        os.close(fd)
    return opened


def _open_direct(file: SourceFile) -> int:
    """The same file with O_DIRECT, or -1 where that is refused: then it is read buffered."""
    # By the descriptor, so that it is the same file even if another took its name.
    with contextlib.suppress(OSError):
        return os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    return -1


def native_file(file: SourceFile, opened: OpenFile) -> File:
    """The file as the library takes it.

    Raises:
        TransferError: it was closed.
    """
    fd = file.fileno()
    if fd is None:
        raise TransferError("the file was closed before it was read", file=file.path)
    return File(
        fd=fd,
        direct_fd=opened.direct_fd,
        size=file.size,
        mode=MODES[opened.mode.name],
        flags=opened.flags,
        direct_offset=opened.direct_offset,
        direct_memory=opened.direct_memory,
    )
