"""The protocols of a source and of its open files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class UsrbioAccess:
    """What the C++ reader threads need to read a file of 3FS past the kernel, by its interface USRBIO.

    Attributes:
        library: path of libhf3fs_api_shared.so.
        mount: the 3FS mount that the file is on.
        rings: reader threads, each with a ring of its own; None: the transfer engine chooses.
        depth: IOs in flight on each ring.
        io_bytes: the largest IO, fitted to the file's chunk size.
        slot_io_bytes: the largest IO that the rings' buffers have room for: files of different chunk sizes share rings.
        io_depth: of the rings: minus the IOs that the daemon carries out as one job at most.
        deadline_s: an IO without a byte for so many seconds has failed.
    """

    library: str
    mount: str
    rings: int | None
    depth: int
    io_bytes: int
    slot_io_bytes: int
    io_depth: int
    deadline_s: float


class SourceFile(Protocol):
    """One open file (or object) of a source. It can be read by several threads at once.

    Callers decide by ``remote``, ``mappable``, ``native_access`` and ``fileno``; ``source`` is for messages only.

    Attributes:
        path: what was opened, for messages.
        source: the name of its source ("posix", "memory", …).
        size: bytes in the file when it was opened.
        remote: whether every read is a request to a server, so that many large reads at once are fastest.
        mappable: whether the kernel reads the file by its descriptor as fast as the source does: then it may be mapped,
            or read by GPUDirect Storage.
        native_access: how the C++ reader threads read the file; None: by ``preadv`` from ``fileno()``.
    """

    path: str
    source: str
    size: int
    remote: bool
    mappable: bool
    native_access: UsrbioAccess | None

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill ``buffers`` in turn with the bytes at ``offset``; return how many came.

        Like ``preadv``: fewer bytes than asked may come, 0 means the end of the file.

        Raises:
            OSError: with the errno of the cause; the caller decides whether to retry.
        """
        ...

    def fileno(self) -> int | None:
        """A descriptor that native threads may ``pread``, or None where there is none."""
        ...

    def identity(self) -> str | None:
        """The same text in each process of this machine that reads the same bytes; None: that cannot be told."""
        ...

    def verify_unchanged(self) -> None:
        """Raise CheckpointError when the file is no longer the one that was opened (size or content changed)."""
        ...

    def close(self) -> None:
        """Give back the descriptor. Safe to call twice."""
        ...


class Source(Protocol):
    """Opens files of one kind of storage.

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

    def folders(self, path: str) -> Sequence[str]:
        """Names of the directories right below the directory ``path``, sorted.

        Raises:
            CheckpointError: the directory is missing or cannot be listed.
        """
        ...
