"""The user's home and the temporary directory, where there may be neither: containers with a user that has no name, or
with a file system that cannot be written.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def home_expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with the user's home in the place of ``~``.

    Raises:
        OSError: it begins with ``~``, and there is no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise OSError(
            errno.ENOENT,
            "there is no home directory (HOME is not set, and this user has no name): name an absolute path",
            os.fspath(path),
        ) from None


def temporary_directory_name() -> str:
    """The temporary directory; where none can be written, what it is called on most machines."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return "/tmp"


def first_writable(places: Iterable[str | os.PathLike[str] | None]) -> str | None:
    """The first directory that this user can write; None where there is none."""
    for place in places:
        if place is not None and os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            return os.fspath(place)
    return None
