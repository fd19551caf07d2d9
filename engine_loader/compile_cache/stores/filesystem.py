"""A store in a directory: a local disk, NFS, 3FS, or any other mount that renames atomically."""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...machine import sync_directory
from ..cache_errors import CacheValidationError
from ..space import Floor, no_room_is_an_interruption
from ..trust import Trust, make_private
from .interface import SUFFIX, Small, Stored

UNFINISHED = ".unfinished-"
_MOST_READ_BYTES = 1 << 30
_TRIES = 10
_USE_RESOLUTION_S = 3600.0


class FilesystemStore:
    """Packs as files below ``directory``.

    A pack is written in its key's directory under a name that readers pass over, synced, and renamed to its content
    hash.

    Args:
        directory: of the store; made when something is saved.
        trust: what is taken from it.
        least_free_bytes: what writing leaves free there.
        store_name: inside every signature.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        trust: Trust,
        least_free_bytes: int = 0,
        store_name: str | None = None,
    ) -> None:
        self.name = store_name or ""
        self.directory = Path(directory).expanduser().absolute()
        self.description = str(self.directory)
        self._trust = trust
        self._floor = Floor(self.directory, least_free_bytes, "compile_cache.min_store_free_bytes")

    def list(self, prefix: str = "") -> Iterable[Stored]:
        return [found for found in self._scan(prefix) if found.name.endswith(SUFFIX)]

    def unfinished(self) -> Iterator[Stored]:
        return (found for found in self._scan("") if found.name.rpartition("/")[2].startswith(UNFINISHED))

    @contextmanager
    def open(self, name: str) -> Iterator[_File]:
        path = self.directory / name
        self._trust.check_store(self.directory)
        for parent in reversed(list(_between(self.directory, path))):
            self._trust.check_entry(parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(f"{path} is not a regular file")
            self._trust.check_entry(path, facts)
            yield _File(descriptor, facts.st_size, path)
        finally:
            os.close(descriptor)

    @contextmanager
    def upload(self, prefix: str) -> Iterator[_Upload]:
        directory = self.directory / prefix
        make_private(self.directory)
        self._trust.check_store(self.directory)
        path = directory / f"{UNFINISHED}{uuid.uuid4().hex}"
        with no_room_is_an_interruption(directory):
            upload = self._begin(path)
            try:
                yield upload
            finally:
                upload.close()
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def read(self, name: str, most_bytes: int) -> Small:
        with self.open(name) as file:
            if file.size > most_bytes:
                path = self.directory / name
                raise CacheValidationError(f"{path}: refused: it has {file.size} bytes, more than {most_bytes}")
            return Small(Stored(name, file.size, 0.0), file.read(0, file.size))

    def replace(self, name: str, content: bytes) -> bool:
        with self.upload(name.rpartition("/")[0]) as upload:
            upload.write(content)
            upload.commit(name)
        return True

    def _begin(self, path: Path) -> _Upload:
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):  # another process deleted the directory, empty then
                make_private(path.parent)
                return _Upload(path, self._floor)
        raise OSError(f"{path.parent}: was deleted by other processes each time it was made")

    def mark_used(self, name: str) -> None:
        path = self.directory / name
        with suppress(OSError):  # a read-only store keeps no times of use
            if time.time() - path.stat().st_mtime > _USE_RESOLUTION_S:
                os.utime(path)

    def delete(self, name: str) -> None:
        path = self.directory / name
        path.unlink(missing_ok=True)
        for parent in _between(self.directory, path):
            with suppress(OSError):  # it is not empty
                parent.rmdir()

    def make_room(self, coming: int) -> None:
        self._floor.check(coming)

    def _scan(self, prefix: str) -> Iterator[Stored]:
        """Entries three levels below: environment, scope, pack. Entries that are deleted meanwhile are passed over."""
        scopes = [self.directory / prefix] if prefix else self._directories(self.directory, 2)
        for scope in scopes:
            try:
                entries = sorted(os.scandir(scope), key=lambda entry: entry.name)
            except FileNotFoundError:
                continue
            for entry in entries:
                with suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(facts.st_mode):
                        yield Stored(f"{scope.relative_to(self.directory)}/{entry.name}", facts.st_size, facts.st_mtime)

    def _directories(self, top: Path, depth: int) -> Iterator[Path]:
        try:
            entries = sorted(os.scandir(top), key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if depth == 1:
                    yield Path(entry.path)
                else:
                    yield from self._directories(Path(entry.path), depth - 1)


class _File:
    def __init__(self, descriptor: int, size: int, path: Path) -> None:
        self.size = size
        self._descriptor = descriptor
        self._path = path

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0:
            part = os.pread(self._descriptor, min(size, _MOST_READ_BYTES), offset)
            if not part:
                raise OSError(f"{self._path} ends before byte {offset + size}")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Upload:
    def __init__(self, path: Path, floor: Floor) -> None:
        self._path = path
        self._floor = floor
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644 & ~0o022)

    def write(self, content: bytes) -> None:
        self._floor.check(len(content))
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def commit(self, name: str) -> None:
        os.fsync(self._descriptor)
        target = self._path.with_name(name.rpartition("/")[2])
        os.replace(self._path, target)
        sync_directory(target.parent)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _between(top: Path, path: Path) -> Iterator[Path]:
    """The directories between ``top`` and ``path``, the deepest first."""
    parent = path.parent
    while parent != top and top in parent.parents:
        yield parent
        parent = parent.parent
