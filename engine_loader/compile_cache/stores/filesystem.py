"""A store in a directory: a local disk, NFS, 3FS, or any other mount that renames atomically."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ...home import home_expanded
from ...machine import sync_directory
from ..cache_errors import CacheValidationError
from ..space import Floor, no_room_is_an_interruption
from ..trust import Trust
from .interface import Small, Stored
from .listing import Listing
from .marker import MarkedStore
from .new_files import Modes, create_as, read_whole, replace_if
from .object_names import MARKER, UNFINISHED, is_key, kind_of

_MOST_READ_BYTES = 1 << 30
_TRIES = 10
_NOTHING = {"lost+found", ".snapshot", ".snapshots"}
"""What file systems put into their own roots."""


class FilesystemStore(MarkedStore):
    """Packs as files below ``directory``.

    A pack is written in its key's directory under a name that readers pass over, synced, and linked to its content
    hash.

    Args:
        directory: of the store; made when something is saved.
        trust: what is taken from it.
        least_free_bytes: what writing leaves free there.
        store_name: that the store must have; None: any.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        trust: Trust,
        least_free_bytes: int = 0,
        store_name: str | None = None,
    ) -> None:
        super().__init__(store_name)
        self.directory = home_expanded(directory).absolute()
        self.description = str(self.directory)
        self.unreadable: list[str] = []
        self._trust = trust
        self._floor = Floor(self.directory, least_free_bytes, "compile_cache.min_store_free_bytes")
        self._listing = Listing(self.directory)

    def found(self) -> None:
        if self._marker is None:
            self._modes().make_directory(self.directory)
        super().found()

    def is_empty(self) -> bool:
        try:
            names = {entry.name for entry in os.scandir(self.directory)}
        except FileNotFoundError:
            return True
        return all(name in _NOTHING or name == MARKER or kind_of(name) == "unfinished" for name in names)

    def entries(self, prefix: str = "") -> list[Stored]:
        found = [_stored(name, facts) for name, facts in self._listing.walk(prefix)]
        self.unreadable = self._listing.unreadable
        for stored in found:
            self._clock.listed(stored.modified)
        return sorted(found, key=lambda stored: stored.name)

    def was_listed(self, name: str) -> bool:
        return name in self._listing.facts

    @contextmanager
    def open(self, name: str) -> Iterator[_File]:
        descriptor, facts = self._open(name)
        try:
            yield _File(descriptor, facts.st_size, self.directory / name, self.reads.setdefault(name, []))
        finally:
            os.close(descriptor)

    def read(self, name: str, most_bytes: int) -> Small:
        descriptor, facts = self._open(name)
        try:
            if facts.st_size > most_bytes:
                raise CacheValidationError(
                    f"{self.directory / name}: refused: it has {facts.st_size} bytes, more than {most_bytes}"
                )
            self.reads.setdefault(name, []).append((0, facts.st_size))
            return Small(_stored(name, facts), read_whole(descriptor, facts.st_size))
        finally:
            os.close(descriptor)

    def create(self, name: str, content: bytes) -> bool:
        with self._beside(name) as unfinished:
            self._write(unfinished, content)
            return create_as(unfinished, self.directory / name)

    def replace(self, name: str, content: bytes, version: str | None = None) -> bool:
        with self._beside(name) as unfinished:
            self._write(unfinished, content)
            target = self.directory / name
            if version is None:
                os.replace(unfinished, target)
                return True
            return replace_if(unfinished, target, lambda facts: _version(facts) == version)

    def vouch(self, stored: Stored) -> None:
        path = self.directory / stored.name
        self._trust.check_store(self.directory)
        for parent in reversed(list(_between(self.directory, path))):
            self._trust.check_entry(parent)
        self._trust.check_entry(path, self._listing.facts.get(stored.name))

    @contextmanager
    def upload(self, prefix: str) -> Iterator[_Upload]:
        directory = self.directory / prefix
        self.found()
        self._trust.check_store(self.directory)
        with no_room_is_an_interruption(directory), self._beside(f"{prefix}/pack") as path:
            upload = self._begin(path)
            try:
                yield upload
            finally:
                upload.close()

    def delete(self, name: str) -> None:
        if kind_of(name) == "foreign":
            raise ValueError(f"{name}: is not a name of a store's own objects")
        path = self.directory / name
        path.unlink(missing_ok=True)
        if is_key(name.rpartition("/")[0]):
            with suppress(OSError):  # it is not empty
                path.parent.rmdir()
                path.parent.parent.rmdir()

    def make_room(self, coming: int) -> None:
        self._floor.check(coming)

    def _open(self, name: str) -> tuple[int, os.stat_result]:
        """Open a file whose directories and itself are trusted."""
        path = self.directory / name
        self._trust.check_store(self.directory)
        for parent in reversed(list(_between(self.directory, path))):
            self._trust.check_entry(parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(f"{path} is not a regular file")
            self._trust.check_entry(path, facts)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, facts

    @contextmanager
    def _beside(self, name: str) -> Iterator[Path]:
        """A path for an unfinished file in the directory of ``name``; the file is removed at the end."""
        path = (self.directory / name).with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
        try:
            yield path
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _begin(self, path: Path) -> _Upload:
        modes = self._modes()
        os.stat(self.directory)  # the root is made by ``found`` only: one without a marker would be refused
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):  # another process deleted the directory, empty then
                modes.make_directory(path.parent)
                return _Upload(path, self._floor, modes)
        raise OSError(f"{path.parent}: was deleted by other processes each time it was made")

    def _write(self, path: Path, content: bytes) -> None:
        """Write a small file; its time is the store's."""
        upload = self._begin(path)
        try:
            upload.write(content)
            self._clock.wrote(upload.modified())
        finally:
            upload.close()

    def _measure(self) -> float:
        with self._beside(MARKER) as path:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, b"?")
                return os.fstat(descriptor).st_mtime
            finally:
                os.close(descriptor)

    def _modes(self) -> Modes:
        return Modes(self.directory, shared=self._trust.signed or self._trust.anyone)


class _File:
    def __init__(self, descriptor: int, size: int, path: Path, reads: list[tuple[int, int]]) -> None:
        self.size = size
        self._descriptor = descriptor
        self._path = path
        self._reads = reads

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        return

    def read(self, offset: int, size: int) -> bytes:
        self._reads.append((offset, size))
        parts = []
        while size > 0:
            part = os.pread(self._descriptor, min(size, _MOST_READ_BYTES), offset)
            if not part:
                raise OSError(f"{self._path} ends before byte {offset + size}")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Upload:
    def __init__(self, path: Path, floor: Floor, modes: Modes) -> None:
        self._path = path
        self._floor = floor
        self._descriptor = modes.make_file(path)

    def write(self, content: bytes) -> None:
        self._floor.check(len(content))
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def modified(self) -> float:
        return os.fstat(self._descriptor).st_mtime

    def commit(self, name: str) -> Stored | None:
        os.fsync(self._descriptor)
        target = self._path.with_name(name.rpartition("/")[2])
        is_new = create_as(self._path, target)
        sync_directory(target.parent)
        return _stored(name, os.fstat(self._descriptor)) if is_new else None

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _stored(name: str, facts: os.stat_result) -> Stored:
    # A pack is never replaced; that of a copied store has another inode.
    return Stored(name, facts.st_size, facts.st_mtime, "" if kind_of(name) == "pack" else _version(facts))


def _version(facts: os.stat_result) -> str:
    return f"{facts.st_ino}-{facts.st_mtime_ns}"


def _between(top: Path, path: Path) -> Iterator[Path]:
    """The directories between ``top`` and ``path``, the deepest first."""
    parent = path.parent
    while parent != top and top in parent.parents:
        yield parent
        parent = parent.parent
