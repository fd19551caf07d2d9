"""The user's home and the temporary directory, where there may be neither: containers with a user that has no name, or
with a file system that cannot be written.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .escaping import printable


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


def nearest_parent(path: str) -> str:
    """The path, or the nearest above it that exists."""
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def why_no_directory(path: str | os.PathLike[str]) -> str | None:
    """What keeps ``path`` from being a directory, or from being made one; None where nothing stands in its place.

    Permissions are not looked at, and what cannot be seen counts as not there.
    """
    nearest = nearest_parent(os.path.abspath(path))
    if os.path.isdir(nearest):
        return None
    if os.path.islink(nearest):
        return f"{printable(nearest)} is a link that leads to no directory"
    return f"{printable(nearest)} is {'a file, ' if os.path.isfile(nearest) else ''}not a directory"
