"""Files that appear under a name only where there is none, with what the file system at hand can do."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..trust import make_private
from .object_names import UNFINISHED

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL}


class Modes:
    """Permissions of what is written.

    Args:
        root: directory of the store.
        shared: packs are trusted by their signature, so that other users may share the store: what is written gets
            the permissions that the root has. Else only this user may write.
    """

    def __init__(self, root: Path, *, shared: bool) -> None:
        self._root = root
        self._shared = shared

    def make_directory(self, path: Path) -> None:
        """Make a directory and those above it that are missing."""
        if not self._shared:
            make_private(path)
            return
        self._root.mkdir(parents=True, exist_ok=True)
        missing = []
        while not path.exists():
            missing.append(path)
            path = path.parent
        for directory in reversed(missing):
            with suppress(FileExistsError):
                directory.mkdir()
                directory.chmod(stat.S_IMODE(self._root.stat().st_mode))

    def make_file(self, path: Path) -> int:
        """Make a file that must not exist; its descriptor, for writing."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        if self._shared:
            with suppress(OSError):
                os.fchmod(descriptor, stat.S_IMODE(self._root.stat().st_mode) & 0o666 | 0o600)
        return descriptor


def create_as(source: Path, target: Path) -> bool:
    """Give a complete file the name ``target`` where there is none; whether it has it now. ``source`` may stay."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        # A server that answers twice says so of its own link, too.
        with suppress(OSError):
            return os.path.samefile(source, target)
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            return False
        os.rename(source, target)
    return True


def replace_if(source: Path, target: Path, is_it: Callable[[os.stat_result], bool]) -> bool:
    """Give a complete file the name ``target`` in place of the file that ``is_it`` describes; whether that was done."""
    aside = target.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        os.rename(target, aside)
    except FileNotFoundError:
        return create_as(source, target)
    try:
        if not is_it(os.stat(aside, follow_symlinks=False)):
            create_as(aside, target)  # somebody else was first: give it back
            return False
        return create_as(source, target)
    finally:
        with suppress(OSError):
            os.unlink(aside)


def read_whole(descriptor: int, size: int) -> bytes:
    """The first ``size`` bytes of an opened file, or what it has of them."""
    parts = []
    offset = 0
    while offset < size and (part := os.pread(descriptor, size - offset, offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
