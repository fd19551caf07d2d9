"""Free space on disks, checked before an operation and while it runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .cache_errors import CacheOperationInterrupted

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Floor:
    """Bytes that must stay free on the file system of ``path``; ``setting`` says so."""

    path: Path
    bytes: int
    setting: str

    def check(self, coming: int = 0) -> None:
        """Check the free space for ``coming`` more bytes.

        Raises:
            CacheOperationInterrupted: they would leave too little.
        """
        free = free_bytes(self.path)
        if free is not None and free - coming < self.bytes:
            raise CacheOperationInterrupted(
                f"{self.path}: not enough room: {mib(free)} free, {mib(coming)} needed, "
                f"and {mib(self.bytes)} are to stay free "
                f"({self.setting}); make room, or lower that setting"
            )


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write at ``path``, which need not exist; None where they are not known."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        facts = os.statvfs(path)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize if facts.f_blocks else None  # network file systems may say 0 of 0


@contextmanager
def no_room_is_an_interruption(path: Path) -> Iterator[None]:
    """Raise the OSError of a full disk as a CacheOperationInterrupted that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise CacheOperationInterrupted(
            f"{path}: no room is left ({os.strerror(error.errno or 0)}); make room there"
        ) from error


def mib(size: int) -> str:
    """A size in words: ``1.5 GiB``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
