"""Files of local and network file systems, read through the kernel."""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from ..errors import CheckpointError, system_failure
from ..failures import end_of_file, errno_hint
from .source import UsrbioAccess

if TYPE_CHECKING:
    from ..settings import LoaderSettings

logger = logging.getLogger(__name__)

# preadv takes at most this many buffers in one call (IOV_MAX).
_IOV_MAX = 1024


class PosixFile:
    """An open regular file."""

    source = "posix"
    remote = False
    mappable = True
    native_access: UsrbioAccess | None = None

    def __init__(self, path: str, fd: int, status: os.stat_result) -> None:
        self.path = path
        self.size = status.st_size
        self._mtime_ns = status.st_mtime_ns
        # A FileIO closes its descriptor when it is garbage collected; a bare descriptor would leak.
        self._file = io.FileIO(fd)

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        return os.preadv(self.fileno(), buffers[:_IOV_MAX], offset)

    def fileno(self) -> int:
        try:
            return self._file.fileno()
        except ValueError:
            raise CheckpointError("the file was closed while it was being read", file=self.path) from None

    def identity(self) -> str | None:
        found = os.fstat(self.fileno())
        return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"

    def verify_unchanged(self) -> None:
        status = os.fstat(self.fileno())
        if status.st_size < self.size:
            raise end_of_file(self.path, status.st_size, self.size)
        if status.st_mtime_ns != self._mtime_ns:
            # Not an error: some network file systems report a new time without a change.
            logger.warning("%s was modified while it was read; if something writes to it, load it again", self.path)

    def close(self) -> None:
        self._file.close()


class PosixSource:
    """The file systems that the kernel has mounted."""

    name = "posix"

    @classmethod
    def from_settings(cls, settings: LoaderSettings) -> Self:
        """A source; no setting changes what it does."""
        return cls()

    def open(self, path: str) -> PosixFile:
        # O_NONBLOCK: opening a named pipe must not hang; it changes nothing for a regular file.
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENXIO:
                raise CheckpointError("this is a socket or a device where a file is meant", file=path) from None
            raise _cannot("open the file", path, error) from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise CheckpointError(f"this is {kind} where a file is meant", file=path)
        except BaseException:
            os.close(fd)
            raise
        return PosixFile(path, fd, status)

    def is_dir(self, path: str) -> bool:
        try:
            return os.path.isdir(path)
        except ValueError:
            return False

    def list(self, path: str) -> list[str]:
        return _entries(path, directories=False)

    def folders(self, path: str) -> Sequence[str]:
        return _entries(path, directories=True)


def _entries(path: str, *, directories: bool) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if _is_dir(entry) is directories)
    except (OSError, ValueError) as error:
        raise _cannot("list the directory", path, error) from None


def _is_dir(entry: os.DirEntry[str]) -> bool:
    # A dangling or forbidden link is an error only for a caller that opens it.
    try:
        return entry.is_dir()
    except OSError:
        return False


def _cannot(doing: str, path: str, error: OSError | ValueError) -> CheckpointError:
    if not isinstance(error, OSError):
        return CheckpointError(f"could not {doing}: {error}", file=path)
    code = error.errno
    name = f" [{errno.errorcode[code]}]" if code is not None and code in errno.errorcode else ""
    return system_failure(code, f"could not {doing}: {error.strerror}{name}", file=path, hint=errno_hint(code))
