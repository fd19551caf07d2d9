"""The sources by name and URL scheme, and which of them reads a path.

To add a source, write one file with a class that has the methods of ``Source`` and a class method ``from_settings``,
and add one line to ``_SOURCES``; see memory.py for an example. If it reads URLs, add their schemes to ``_SCHEMES``; if
users choose it by the setting ``loader.backend``, add its name to the values of that setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import CheckpointError
from .object_store.url import SCHEMES as OBJECT_STORE_SCHEMES
from .source import Source, SourceFile

if TYPE_CHECKING:
    from ..settings import LoaderSettings

_SOURCES = {
    "posix": ".posix:PosixSource",
    "usrbio": ".threefs.threefs_source:ThreeFsSource",
    "object_store": ".object_store.object_source:ObjectStoreSource",
    "memory": ".memory:MemorySource",
}
"""Backend -> its class, imported when it is first used: asking ``is_remote`` must not cost the imports of a source."""

_SCHEMES: dict[str, str] = dict.fromkeys(OBJECT_STORE_SCHEMES, "object_store")
"""Scheme of a URL -> the backend that reads it."""

# pathlib.Path makes one slash of the two of a URL.
_URL = re.compile(r"([a-z][a-z0-9+.-]*):/.", re.DOTALL)


class _SourceClass(Protocol):
    def from_settings(self, settings: LoaderSettings) -> Source:
        """A source that reads as the settings say."""
        ...


def make_source(
    backend: str,
    files: Mapping[str, bytes | bytearray | memoryview] | None = None,
    settings: LoaderSettings | None = None,
) -> Source:
    """The source that ``backend`` names; "auto" is object_store for URLs, usrbio for files on 3FS, else posix.

    Args:
        backend: auto, posix, usrbio, object_store or memory.
        files: what the memory source holds: path -> content.
        settings: how files on 3FS and objects are read.

    Raises:
        CheckpointError: the backend is not one of these or is not available, or ``files`` does not go with it.
    """
    if files is not None:
        if backend not in ("memory", "auto"):
            raise CheckpointError(f"files= goes with backend='memory', not with {backend!r}")
        from .memory import MemorySource

        return MemorySource(files)
    if settings is None:
        from ..settings import LoaderSettings

        settings = LoaderSettings()
    if backend == "auto":
        return AutoSource(settings)
    if backend not in _SOURCES:
        raise CheckpointError(f"there is no backend {backend!r}", hint=f"auto, {', '.join(_SOURCES)}")
    found = cast("_SourceClass", resolve_name(f"{__package__}{_SOURCES[backend]}"))
    return found.from_settings(settings)


def remote_backend(path: str) -> str | None:
    """The backend for a path that is a URL, also one that lost a slash in pathlib; None for paths of files."""
    found = _URL.match(path)
    return _SCHEMES.get(found[1]) if found else None


def is_remote(path: str) -> bool:
    """Whether a path names an object in a store, not a file that this machine has mounted."""
    return remote_backend(path) is not None


class AutoSource:
    """Objects for URLs of object stores, files for all other paths.

    Attributes:
        name: of the source that opened the last file.
    """

    def __init__(self, settings: LoaderSettings) -> None:
        from .threefs.threefs_source import ThreeFsOptions, ThreeFsSource

        self._files = ThreeFsSource(ThreeFsOptions.from_settings(settings), fallback=True)
        self._remote = {backend: make_source(backend, settings=settings) for backend in set(_SCHEMES.values())}
        self.name = self._files.name

    def open(self, path: str) -> SourceFile:
        source = self._source(path)
        file = source.open(path)
        self.name = source.name
        return file

    def is_dir(self, path: str) -> bool:
        return self._source(path).is_dir(path)

    def list(self, path: str) -> list[str]:
        return self._source(path).list(path)

    def folders(self, path: str) -> Sequence[str]:
        return self._source(path).folders(path)

    def _source(self, path: str) -> Source:
        backend = remote_backend(path)
        return self._files if backend is None else self._remote[backend]
