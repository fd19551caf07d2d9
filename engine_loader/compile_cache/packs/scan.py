"""Which files the local caches hold.

A save signs what it finds here, for the whole fleet. So a cache is walked by descriptors, and only what this user or
root alone could have written is taken. Of links, those are followed that this user or root made to a directory outside
of the cache: people put parts of a cache on another disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..directories import CacheRoot, way_out
from ..ownership import Access, is_own_link
from .layouts import made_by_compiler
from .manifest import unsafe_link

_MOST_LINKS = 8
_STRICT = Access()


class LocalFile(NamedTuple):
    """A file of a local cache.

    Attributes:
        path: as in packs, "<root>/<path below it>".
        local: where it is.
        ctime_ns: when it was put there, which its mtime need not say.
        link: the target if it is a symbolic link, else empty.
        identity: device, inode and time of the last change; None where they are not known.
    """

    path: str
    local: str
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    link: str = ""
    identity: tuple[int, int, int] | None = None


def scan(
    roots: Iterable[CacheRoot],
    directories: Mapping[str, Path],
    messages: list[str] | None = None,
    *,
    made: Callable[[str, str], bool] = made_by_compiler,
    anyone: bool = False,
) -> list[LocalFile]:
    """All files that may be packed, sorted by path. Files that are deleted meanwhile are left out.

    Args:
        roots: the caches to look at.
        directories: name of a cache -> where it is here.
        messages: gets one for each cache of which something is left because others could have written it, or because
            a link leads to it that is not followed.
        made: whether a path of a cache is one that its compiler makes.
        anyone: take what others could have written, too.
    """
    found: list[LocalFile] = []
    for root in roots:
        if root.name in directories:
            walk = _Walk(root, directories[root.name], made, Access(anyone))
            found += walk.files()
            if messages is not None:
                messages += walk.messages()
    return sorted(found)


def open_unchanged(file: LocalFile) -> int:
    """A descriptor for reading the very file that was scanned.

    Raises:
        OSError: it cannot be opened, or another file is in its place.
    """
    descriptor = os.open(file.local, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    facts = os.fstat(descriptor)
    # An inode's number is used again when its file is gone; the time of its last change then tells.
    if file.identity is not None and file.identity != (facts.st_dev, facts.st_ino, facts.st_ctime_ns):
        os.close(descriptor)
        raise OSError(errno.ESTALE, "it was replaced while it was being saved", file.local)
    return descriptor


class _Walk:
    """One cache, from its directory downwards."""

    def __init__(
        self, root: CacheRoot, directory: Path, made: Callable[[str, str], bool], access: Access = _STRICT
    ) -> None:
        self._root = root
        self._directory = directory
        self._made = made
        self._access = access
        self._refused: list[str] = []
        self._links: list[str] = []
        self._followed: set[tuple[int, int]] = set()

    def files(self) -> Iterator[LocalFile]:
        with suppress(OSError), _opened(self._directory, self._refuse, self._access) as descriptor:
            if descriptor >= 0:
                yield from self._below(descriptor, "", self._access.below(os.fstat(descriptor)))

    def messages(self) -> list[str]:
        found = []
        if self._refused:
            more = f" (and {len(self._refused) - 1} more)" if len(self._refused) > 1 else ""
            is_root = self._refused[0].startswith(f"{self._directory}: ")
            hint = way_out(self._root.name, self._directory) if is_root else "close it (`chmod -R go-w`)"
            found.append(f"the cache {self._root.name}: not saved: {self._refused[0]}{more}; {hint}")
        if self._links:
            more = f" (and {len(self._links) - 1} more)" if len(self._links) > 1 else ""
            found.append(f"the cache {self._root.name}: not saved: {self._links[0]}{more}")
        return found

    def _refuse(self, path: str, reason: str) -> None:
        self._refused.append(f"{os.path.normpath(os.path.join(self._directory, path))}: {reason}")

    def _below(self, descriptor: int, relative: str, access: Access) -> Iterator[LocalFile]:
        """What lies in an opened directory that nobody else may write."""
        with os.scandir(descriptor) as listing:
            entries = list(listing)
        for entry in entries:
            path = f"{relative}{entry.name}"
            with suppress(OSError):
                facts = entry.stat(follow_symlinks=False)
                is_link = stat.S_ISLNK(facts.st_mode)
                if stat.S_ISDIR(facts.st_mode):
                    yield from self._enter(descriptor, entry.name, path, access)
                elif is_link and self._leads_out_to_a_directory(path):
                    yield from self._follow(path)
                elif self._is_taken(path, facts, access):
                    link = os.readlink(entry.name, dir_fd=descriptor) if is_link else ""
                    packed = f"{self._root.name}/{path}"
                    if link and unsafe_link(packed, link):
                        self._links.append(f"{os.path.join(self._directory, path)}: a link that leads out of the cache")
                        continue
                    yield LocalFile(
                        packed,
                        os.path.join(self._directory, path),
                        0 if link else facts.st_size,
                        facts.st_mtime_ns,
                        facts.st_ctime_ns,
                        stat.S_IMODE(facts.st_mode) & 0o777,
                        link,
                        (facts.st_dev, facts.st_ino, facts.st_ctime_ns),
                    )

    def _enter(self, parent: int, name: str, path: str, access: Access) -> Iterator[LocalFile]:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            facts = os.fstat(descriptor)
            if reason := access.problem(facts):
                self._refuse(path, reason)
            else:
                yield from self._below(descriptor, f"{path}/", access.below(facts))
        finally:
            os.close(descriptor)

    def _leads_out_to_a_directory(self, path: str) -> bool:
        """Whether a link leads to a directory that is not part of this cache, and so is not met on another way."""
        place = os.path.join(self._directory, path)
        root = os.path.realpath(self._directory)
        return os.path.isdir(place) and not f"{os.path.realpath(place)}/".startswith(f"{root.rstrip('/')}/")

    def _follow(self, path: str) -> Iterator[LocalFile]:
        """What lies where a link to a directory leads, if the user made the link."""
        with _opened(self._directory / path, lambda _, reason: self._refuse(path, reason), self._access) as descriptor:
            if descriptor < 0:
                return
            facts = os.fstat(descriptor)
            if (facts.st_dev, facts.st_ino) in self._followed:  # links that lead to one place, or round in a circle
                return
            self._followed.add((facts.st_dev, facts.st_ino))
            yield from self._below(descriptor, f"{path}/", self._access.below(facts))

    def _is_taken(self, path: str, facts: os.stat_result, access: Access) -> bool:
        if not (stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode)):
            return False
        if not self._root.takes(path) or not self._made(self._root.name, path):
            return False
        # A link has no mode of its own: it is 777 everywhere.
        closed = facts if stat.S_ISREG(facts.st_mode) else _with_mode(facts, 0o600)
        if reason := access.problem(closed):
            self._refuse(path, reason)
            return False
        return True


def _with_mode(facts: os.stat_result, mode: int) -> os.stat_result:
    return os.stat_result((mode, *facts[1:]))


@contextmanager
def _opened(directory: Path, refuse: Callable[[str, str], None], access: Access) -> Iterator[int]:
    """A descriptor of a directory; -1 where it is refused. Links there are followed if they are this user's.

    Raises:
        OSError: there is no such directory.
    """
    place = os.fspath(directory)
    for _ in range(_MOST_LINKS):
        here = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            facts = os.fstat(here)
            if not stat.S_ISLNK(facts.st_mode):
                reason = access.problem(facts)
                if reason is None:
                    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
                break
            if not is_own_link(facts, access):
                reason = f"it is a link of user {facts.st_uid}"
                break
            place = os.path.join(os.path.dirname(place), os.readlink("", dir_fd=here))
        finally:
            os.close(here)
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(directory))
    if reason is not None:
        refuse("", reason)
        yield -1
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
