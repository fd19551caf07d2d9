"""Staging directories: files are written there, and renamed into a local cache when all are complete.

What a cache has stays as it is, for a compiler may be using it. No process sees half a file.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..cache_errors import CacheValidationError
from ..directories import STATE
from ..packs.manifest import PackedFile
from ..packs.pack import Pack
from ..packs.relocate import is_group_file, relocated
from ..trust import check_private, make_private

STAGING = "restore-"


def make_staging(directory: Path) -> Path:
    """A new directory on the file system of the cache ``directory``.

    Raises:
        CacheValidationError: other users may write to the cache.
        OSError: the directory cannot be made.
    """
    for path in (directory, directory / STATE):
        make_private(path)
        check_private(path)
    path = directory / STATE / f"{STAGING}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path.mkdir(mode=0o700)
    return path


def write_file(
    pack: Pack, file: PackedFile, content: bytes, staging: Path, directories: Mapping[str, Path], location: str
) -> None:
    """Write one file of a frame below ``staging``.

    Args:
        content: of the frame.
        staging: directory of the file's cache.
        directories: name of a cache -> where it is on this node; Triton's group files are rewritten for it.
        location: of the pack, for messages.

    Raises:
        CacheValidationError: the archive and the manifest differ.
    """
    head = file.head()
    begin = file.offset + len(head)
    if content[file.offset : begin] != head:
        raise CacheValidationError(
            f"{location}: refused: the archive says something else of {file.path!r} than the manifest"
        )
    target = os.path.join(staging, file.path.partition("/")[2])
    if file.link:
        os.symlink(file.link, target)
        return
    data: memoryview | bytes = memoryview(content)[begin : begin + file.size]
    if is_group_file(file.path):
        data = relocated(bytes(data), pack.manifest.roots, directories)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fchmod(descriptor, file.mode & 0o755 | 0o600)
        os.utime(descriptor, ns=(file.mtime_ns, file.mtime_ns))
    finally:
        os.close(descriptor)


def move_into_place(source: Path, target: Path) -> None:
    """Rename what ``source`` holds into ``target``: whole directories where there are none yet, else file by file.

    What exists is never touched.
    """
    for entry in os.scandir(source):
        destination = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            if not os.path.lexists(destination):
                try:
                    os.rename(entry.path, destination)
                    continue
                except OSError as error:  # another process made it meanwhile
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
            if os.path.isdir(destination) and not os.path.islink(destination):
                move_into_place(Path(entry.path), destination)
        else:
            with suppress(FileExistsError):
                _rename_new(entry.path, destination)


def _rename_new(source: str, destination: Path) -> None:
    """Rename, or fail where ``destination`` exists. (A hard link is the only such call that every kernel has.)"""
    try:
        os.link(source, destination, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(destination):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination)) from None
        os.rename(source, destination)
