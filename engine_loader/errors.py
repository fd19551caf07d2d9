"""The exceptions of this package.

Every error says what happened, to which file and byte, and what to do.
"""

from __future__ import annotations

import difflib
import errno
import heapq
import os
from collections.abc import Iterable

from .escaping import printable

_MOST_CANDIDATES = 500


class EngineLoaderError(Exception):
    """Base class of the exceptions of this package."""


class SettingsError(EngineLoaderError, ValueError):
    """A setting is unknown or has a bad value; the message names the file and line, or the variable, that sets it."""


class CheckpointError(EngineLoaderError):
    """A checkpoint cannot be read as asked.

    Attributes:
        message: what is wrong, without file and offset.
        file: the file concerned, if there is one.
        offset: the byte offset in that file, if there is one.
        hint: what the reader of the message can do.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else os.fspath(file)
        self.offset = offset
        self.hint = hint
        super().__init__(self._text())

    def _text(self) -> str:
        prefix = "" if self.file is None else f"{printable(self.file)}: "
        if self.offset is not None:
            prefix = f"{prefix}at byte {self.offset}: "
        hint = "" if self.hint is None else f" ({self.hint})"
        return f"{prefix}{self.message}{hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Engines send exceptions between processes; by default, pickle would call the constructor with the text alone.
        return (_rebuild, (type(self), self.message, self.file, self.offset, self.hint), self.__dict__)


class TransferError(CheckpointError):
    """Bytes could not be read: an I/O error, a deadline, a file that changed. ``errno`` is the cause, or None."""

    errno: int | None = None


class TransferSystemError(TransferError, OSError):
    """The system refused or failed: an ``OSError`` as well, with ``errno``, ``strerror`` and ``filename``."""

    # Of OSError, these are filled by its constructor; here they follow from what CheckpointError knows.
    __str__ = TransferError._text

    @property
    def strerror(self) -> str | None:  # type: ignore[override]
        return None if self.errno is None else os.strerror(self.errno)

    @property
    def filename(self) -> str | None:
        return self.file


class MissingFileError(TransferSystemError, FileNotFoundError):
    """There is no such file, or no such object: a ``FileNotFoundError`` as well."""


class DeniedFileError(TransferSystemError, PermissionError):
    """This user may not read the file: a ``PermissionError`` as well."""


class NoDirectoryError(TransferSystemError, NotADirectoryError):
    """A part of the path is a file: a ``NotADirectoryError`` as well."""


_KINDS: dict[int, type[TransferSystemError]] = {
    errno.ENOENT: MissingFileError,
    errno.EACCES: DeniedFileError,
    errno.EPERM: DeniedFileError,
    errno.ENOTDIR: NoDirectoryError,
}


def system_failure(
    code: int | None, message: str, *, file: str | None = None, offset: int | None = None, hint: str | None = None
) -> TransferError:
    """The error for what the system refused with errno ``code``; None or 0: it is not known."""
    kind = _KINDS.get(code, TransferSystemError) if code else TransferError
    error = kind(message, file=file, offset=offset, hint=hint)
    error.errno = code
    return error


class TransferCancelled(TransferError):
    """A transfer was cancelled by its owner; the destinations hold unspecified bytes."""


class TensorNotFoundError(CheckpointError, KeyError):
    """The checkpoint has no tensor of the requested name."""

    # KeyError's text is the repr of its argument; this message is a sentence.
    __str__ = CheckpointError.__str__

    @classmethod
    def among(cls, name: str, names: Iterable[str], file: str | None) -> TensorNotFoundError:
        """Build the error for ``name`` with the nearest of ``names`` as the suggestion."""
        near = difflib.get_close_matches(name, _candidates(name, names), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "list the names with .keys()"
        return cls(f"no tensor named {name!r}", file=file, hint=hint)


def _rebuild(
    kind: type[CheckpointError], message: str, file: str | None, offset: int | None, hint: str | None
) -> CheckpointError:
    return kind(message, file=file, offset=offset, hint=hint)


def _candidates(name: str, names: Iterable[str]) -> list[str]:
    """The ``names`` with the longest common beginning and end with ``name``. Comparing all names would take seconds."""

    def alike(other: str) -> int:
        # A common prefix of characters, not of parts of a path.
        begin = os.path.commonprefix([name, other])  # noqa: RUF071
        end = os.path.commonprefix([name[::-1], other[::-1]])  # noqa: RUF071
        return len(begin) + len(end)

    return heapq.nlargest(_MOST_CANDIDATES, names, key=alike)
