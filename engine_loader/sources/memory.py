"""Files that are bytes in memory, for tests and for checkpoints that the caller has fetched.

The smallest source, and the example for a new one (see registry.py).
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from ..errors import CheckpointError
from .source import UsrbioAccess

if TYPE_CHECKING:
    from ..settings import LoaderSettings


class MemoryFile:
    """One entry of a MemorySource."""

    source = "memory"
    remote = False
    mappable = False
    native_access: UsrbioAccess | None = None

    def __init__(self, path: str, content: memoryview) -> None:
        self.path = path
        self.size = len(content)
        self._content = content

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        begin = offset
        for buffer in buffers:
            piece = self._content[offset : offset + len(buffer)]
            buffer[: len(piece)] = piece
            offset += len(piece)
            if len(piece) < len(buffer):
                break
        return offset - begin

    def fileno(self) -> int | None:
        return None

    def identity(self) -> str | None:
        return None

    def verify_unchanged(self) -> None:
        return

    def close(self) -> None:
        return


class MemorySource:
    """A tree of files held in memory, given as path -> content."""

    name = "memory"

    def __init__(self, files: Mapping[str, bytes | bytearray | memoryview]) -> None:
        self._files = {posixpath.normpath(path): memoryview(content).cast("B") for path, content in files.items()}

    @classmethod
    def from_settings(cls, settings: LoaderSettings) -> Self:
        """A source without files."""
        return cls({})

    def open(self, path: str) -> MemoryFile:
        content = self._files.get(posixpath.normpath(path))
        if content is None:
            if self.is_dir(path):
                raise CheckpointError("this is a directory where a file is meant", file=path)
            raise CheckpointError("there is no such file in memory", file=path)
        return MemoryFile(path, content)

    def is_dir(self, path: str) -> bool:
        prefix = _prefix(path)
        return any(name.startswith(prefix) for name in self._files)

    def list(self, path: str) -> list[str]:
        prefix = _prefix(path)
        names = sorted(name[len(prefix) :] for name in self._files if name.startswith(prefix))
        if not names:
            raise CheckpointError("there is no such directory in memory", file=path)
        return [name for name in names if "/" not in name]

    def folders(self, path: str) -> Sequence[str]:
        prefix = _prefix(path)
        below = [name[len(prefix) :] for name in self._files if name.startswith(prefix)]
        return sorted({name.partition("/")[0] for name in below if "/" in name})


def _prefix(directory: str) -> str:
    """What the paths below ``directory`` begin with."""
    path = posixpath.normpath(directory)
    return "" if path == "." else path.rstrip("/") + "/"
