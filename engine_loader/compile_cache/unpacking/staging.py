"""Staging directories: files are written there, and renamed into a local cache when all are complete.

What a cache has stays as it is, for a compiler may be using it. No process sees half a file.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..cache_errors import CacheValidationError
from ..directories import STATE, way_out
from ..ownership import Access, is_own_link
from ..packs.manifest import PackedFile
from ..packs.pack import Pack
from ..packs.relocate import is_group_file, relocated
from ..trust import make_private

STAGING = "restore-"
_STRICT = Access()


def make_staging(directory: Path, access: Access = _STRICT, *, name: str = "") -> Path:
    """A new directory on the file system of the cache ``directory``.

    Args:
        directory: of the cache.
        access: what is taken of it.
        name: of the cache, for messages.

    Raises:
        CacheValidationError: other users may write to the cache, or made a link in its place.
        OSError: the directory cannot be made.
    """
    for path in (directory, directory / STATE):
        make_private(path)
        facts = path.lstat()
        if path.is_symlink() and not is_own_link(facts, access):
            raise CacheValidationError(f"{path}: refused: it is a link of user {facts.st_uid}, and caches are code")
        if reason := access.problem(path.stat()):
            raise CacheValidationError(f"{path}: refused: {reason}, and caches are code; {way_out(name, directory)}")
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


def move_into_place(source: Path, target: Path, access: Access = _STRICT) -> dict[str, str]:
    """Rename what ``source`` holds into ``target``: whole directories where there are none yet, else file by file.

    What exists is never touched. Directories are walked by descriptors: one that others may write is left alone, and so
    is a link that would point out of its directory by way of what is there already. A link that is there and leads to a
    directory outside is followed if this user or root made it, also to another file system.

    Returns:
        path in ``target`` that was left alone, with everything below it -> why.
    """
    left: dict[str, str] = {}
    with _directory(source) as origin, _directory(target) as destination:
        below = access.below(os.fstat(destination))
        _move(origin, destination, str(target), _Target(os.path.realpath(target), access, left), below)
    return left


class _Target(NamedTuple):
    """The cache that files are moved into.

    Attributes:
        root: its real path.
        access: what is taken of it.
        left: gets what is left alone, and why.
    """

    root: str
    access: Access
    left: dict[str, str]


@contextmanager
def _directory(path: str | os.PathLike[str], parent: int | None = None) -> Iterator[int]:
    # The directory of a cache itself may be a link: make_staging has looked at it.
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if parent is None else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _move(source: int, target: int, where: str, cache: _Target, access: Access) -> None:
    with os.scandir(source) as listing:
        entries = list(listing)
    for entry in entries:
        place = f"{where}/{entry.name}"
        if not entry.is_dir(follow_symlinks=False):
            if entry.is_symlink() and _leaves(entry.name, source, where):
                cache.left[place] = (
                    "is not put there: by way of a link that is there it would lead out of its directory"
                )
                continue
            with suppress(FileExistsError):
                _rename_new(entry.name, source, target)
            continue
        if not _exists(entry.name, target) and _moved_whole(entry.name, source, target):
            continue
        try:
            with (
                _directory(entry.name, source) as origin,
                _destination(entry.name, target, place, cache, access) as (destination, reached),
            ):
                facts = os.fstat(destination)
                if reason := reached.problem(facts):
                    cache.left[place] = f"is left alone: {reason}, and caches are code"
                else:
                    _move(origin, destination, place, cache, reached.below(facts))
        except NotADirectoryError:
            cache.left[place] = "is left alone: it is not a directory"
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EACCES):
                raise
            cache.left[place] = f"is left alone: {error.strerror}"


def _moved_whole(name: str, source: int, target: int) -> bool:
    """Whether a directory could be renamed; else there is one of its name now, for what is in it."""
    try:
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
    except OSError as error:
        if error.errno == errno.EXDEV:  # below a link
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=target)
        elif error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another process made it meanwhile
            raise
        return False
    return True


@contextmanager
def _destination(name: str, parent: int, place: str, cache: _Target, access: Access) -> Iterator[tuple[int, Access]]:
    """A directory that is there, or the one to which a link of this user leads out of the cache; with what is taken."""
    facts = os.stat(name, dir_fd=parent, follow_symlinks=False)
    real = os.path.realpath(place)
    leads_out = not f"{real}/".startswith(f"{cache.root.rstrip('/')}/")
    if stat.S_ISLNK(facts.st_mode) and is_own_link(facts, cache.access) and leads_out:
        with _directory(real) as descriptor:
            yield descriptor, cache.access
    else:
        with _directory(name, parent) as descriptor:
            yield descriptor, access


def _leaves(name: str, source: int, where: str) -> bool:
    """Whether a link, put into the directory ``where``, would lead out of it by way of links that are there."""
    here = os.path.realpath(where)
    there = os.path.realpath(os.path.join(here, os.readlink(name, dir_fd=source)))
    return there != here and not there.startswith(f"{here.rstrip('/')}/")


def _exists(name: str, parent: int) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _rename_new(name: str, source: int, target: int) -> None:
    """Rename, or fail where ``name`` exists. (A hard link is the only such call that every kernel has.)"""
    try:
        os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links, or another one
        if _exists(name, target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
        if error.errno != errno.EXDEV:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
            return
        beside = f"tmp.{name}.{uuid.uuid4().hex[:8]}"
        _copy(name, source, beside, target)
        os.rename(beside, name, src_dir_fd=target, dst_dir_fd=target)


def _copy(name: str, source: int, copy: str, target: int) -> None:
    """Copy a file or a link with its mode and times."""
    facts = os.stat(name, dir_fd=source, follow_symlinks=False)
    if stat.S_ISLNK(facts.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), copy, dir_fd=target)
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source), "rb") as content,
        open(os.open(copy, flags, 0o600, dir_fd=target), "wb") as written,
    ):
        try:
            shutil.copyfileobj(content, written)
            written.flush()
            os.fchmod(written.fileno(), stat.S_IMODE(facts.st_mode))
            os.utime(written.fileno(), ns=(facts.st_mtime_ns, facts.st_mtime_ns))
        except OSError:
            os.unlink(copy, dir_fd=target)
            raise
