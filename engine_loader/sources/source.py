"""What a source of bytes is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class SourceFile(Protocol):
    """One open file (or object) of a source. It can be read by several threads at once.

    Attributes:
        path: what was opened, for messages.
        source: the name of its source ("posix", "memory", …).
        size: bytes in the file when it was opened.
    """

    path: str
    source: str
    size: int

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill ``buffers`` in turn with the bytes at ``offset``; return how many came.

        Like ``preadv``: fewer bytes than asked may come, 0 means the end of the file.

        Raises:
            OSError: with the errno of the cause; the reader threads decide whether to try again.
        """
        ...

    def fileno(self) -> int | None:
        """A descriptor that native threads may ``pread``, or None where there is none."""
        ...

    def verify_unchanged(self) -> None:
        """Raise CheckpointError when the file is no longer the one that was opened (size or content changed)."""
        ...

    def close(self) -> None:
        """Give back the descriptor. Safe to call twice."""
        ...


class Source(Protocol):
    """A place that files are opened from.

    Attributes:
        name: as in the ``backend`` option and the log line.
    """

    name: str

    def open(self, path: str) -> SourceFile:
        """Open a file for reading.

        Raises:
            CheckpointError: it is missing, not readable, or not a regular file; the message says which.
        """
        ...

    def is_dir(self, path: str) -> bool:
        """Whether ``path`` is a directory of this source."""
        ...

    def list(self, path: str) -> list[str]:
        """Names of the files right below the directory ``path``, sorted.

        Raises:
            CheckpointError: the directory is missing or cannot be listed.
        """
        ...
