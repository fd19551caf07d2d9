"""Weights on a disk of this node: ranges of objects, kept as they are read, for the next start.

Below the directory lies one for each object, in it one for each version (ETag and size), in it a file for each range,
named by where the range begins and ends. A file has its name when its bytes are on the disk, so what has a name is
complete; and the bytes of a version are the same, whoever writes them. So several processes may read and write at once,
be killed at any moment, and delete what others use: who misses a range asks the object store for it.

Nothing here raises, and nothing waits for the disk but the reading of a file that is there: ranges are written by two
threads, and what they cannot keep up with is not kept.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ...home import home_expanded, why_no_directory
from ...settings import LoaderSettings
from .kept_version import KeptVersion

logger = logging.getLogger(__name__)

_WRITERS = 2
_WAITING_BYTES = 128 << 20
_PATIENCE_S = 2.0
"""For which all readers of this process together wait for the writers."""
_EXIT_S = 1.0
_FREE_SHARE = 0.05
"""Of the disk, which stays free."""
_COUNT_AGAIN_BYTES = 256 << 20
_LEFT_OVER_S = 3600.0
_CLOCK_S = 1.0
"""By which the times of files may lag behind."""
_USED = ".used"
_LOCK = ".lock"
_UNFINISHED = ".tmp"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class _Range:
    """A range whose bytes wait to be written."""

    version: KeptVersion
    begin: int
    content: np.ndarray


class NodeCache:
    """The ranges that are kept below a directory.

    Args:
        directory: this user's own; it exists.
        limit_bytes: how many bytes are kept, about; None: what the disk has room for.
    """

    def __init__(self, directory: Path, limit_bytes: int | None) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._waiting: deque[_Range] = deque()
        self._waiting_bytes = 0
        self._threads: list[threading.Thread] = []
        self._keeps = True
        self._in_use: Counter[Path] = Counter()
        self._load_began = time.time()
        self._patience_s = _PATIENCE_S
        self._room = threading.Lock()
        self._bytes: int | None = None
        self._since_count = 0
        self._being_written = 0  # bytes that have room, and that a count may not find yet
        self._numbers = itertools.count()

    @classmethod
    def from_settings(cls, settings: LoaderSettings) -> NodeCache | None:
        """The cache that the settings name; None where none is set or it cannot be used, which is a warning."""
        if settings.cache_directory is None:
            return None
        limit = None if settings.cache_bytes is None else int(settings.cache_bytes)
        return _cache_at(settings.cache_directory, limit)

    def version(self, url: str, tag: str | None, size: int) -> KeptVersion | None:
        """What is kept of the version of an object; None where versions cannot be told apart.

        What is kept of its other versions is deleted.

        Args:
            url: of the object, with what tells servers apart.
            tag: its strong ETag.
            size: in bytes.
        """
        if not tag:
            return None
        of_object = self.directory / hashlib.sha256(url.encode()).hexdigest()[:32]
        directory = of_object / hashlib.sha256(f"{tag}\0{size}".encode()).hexdigest()[:32]
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (directory / _USED).touch()
            for other in of_object.iterdir():
                if other != directory:
                    shutil.rmtree(other, ignore_errors=True)
        except OSError as error:
            self._stop(f"{directory}: {error.strerror}")
        with self._changed:
            if not self._in_use.total():
                self._load_began = time.time()
            self._in_use[directory] += 1
        return KeptVersion(directory, size, self)

    def release(self, version: KeptVersion) -> None:
        """This process reads the version no more: it may be deleted to make room for others."""
        with self._changed:
            self._in_use[version.directory] -= 1

    def offer(self, version: KeptVersion, begin: int, content: np.ndarray) -> None:
        """Have bytes written that begin at ``begin``, if the writers are not too far behind."""
        nbytes = content.nbytes
        with self._changed:
            if not self._keeps or not self._wait_for_writers(nbytes):
                return
            self._waiting.append(_Range(version, begin, content))
            self._waiting_bytes += nbytes
            if len(self._threads) < _WRITERS:
                thread = threading.Thread(target=self._write_all, name="engine-loader-keep", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def _wait_for_writers(self, nbytes: int) -> bool:
        """Whether there is memory for so many bytes that wait; a disk that is slow must not slow every read."""
        began = time.monotonic()
        fits = self._changed.wait_for(
            lambda: self._waiting_bytes + nbytes <= max(_WAITING_BYTES, nbytes), max(0.0, self._patience_s)
        )
        if not fits and self._patience_s > 0:
            logger.warning(
                "%s: the disk does not keep up; of what is read from object stores, a part is not kept", self.directory
            )
        self._patience_s = self._patience_s - (time.monotonic() - began) if fits else 0.0
        return fits

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was offered is written; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting_bytes, timeout_s)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                kept = self._waiting.popleft()
            try:
                if self._keeps:
                    self._write(kept)
            except OSError as error:
                self._stop(f"{kept.version.directory}: {error.strerror}")
            finally:
                with self._changed:
                    self._waiting_bytes -= kept.content.nbytes
                    self._changed.notify_all()

    def _write(self, kept: _Range) -> None:
        nbytes = kept.content.nbytes
        if not self._has_room(nbytes):
            self._stop("there is no more room for weights on this node (cache_bytes, or what the disk has free)")
            return
        try:
            self._write_range(kept)
        finally:
            with self._room:
                self._being_written -= nbytes

    def _write_range(self, kept: _Range) -> None:
        directory, end = kept.version.directory, kept.begin + kept.content.nbytes
        unfinished = directory / f"{_UNFINISHED}-{os.getpid()}-{next(self._numbers)}"
        try:
            _write_whole(unfinished, kept.content.data)
            unfinished.rename(directory / f"{kept.begin:x}-{end:x}")
        except FileNotFoundError:  # another process made room by deleting this version
            return
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            if error.errno not in _NO_ROOM:
                raise
            self._stop(f"{directory}: {error.strerror}")
            return
        kept.version.add(kept.begin, end)

    def _has_room(self, nbytes: int) -> bool:
        """Whether a range of this size may be written; what was used least recently is deleted for it."""
        with self._room:
            fits = self._make_room(nbytes)
            if fits:
                self._since_count += nbytes  # also where the write fails: then nothing more is kept
                self._being_written += nbytes
            return fits

    def _make_room(self, nbytes: int) -> bool:
        if self._bytes is None or self._since_count >= _COUNT_AGAIN_BYTES:
            self._bytes, self._since_count = self._count(), self._being_written
        if self._lacking(nbytes) <= 0:
            return True
        with _locked(self.directory):
            self._bytes, self._since_count = self._count(), self._being_written
            for used, version in sorted((_last_use(version), version) for version in self._versions()):
                # The objects of a model that does not fit must not make room for each other: none would be left.
                if self._lacking(nbytes) <= 0 or used >= self._load_began - _CLOCK_S:
                    break
                freed = _bytes_in(version)
                shutil.rmtree(version, ignore_errors=True)
                self._bytes -= freed
        return self._lacking(nbytes) <= 0

    def _lacking(self, nbytes: int) -> int:
        """How many bytes have to go before so many more may be written."""
        facts = os.statvfs(self.directory)
        free, floor = facts.f_bavail * facts.f_frsize, int(facts.f_blocks * facts.f_frsize * _FREE_SHARE)
        lacking = nbytes - (free - floor)
        if self.limit_bytes is not None:
            lacking = max(lacking, (self._bytes or 0) + self._since_count + nbytes - self.limit_bytes)
        return lacking

    def _versions(self) -> list[Path]:
        found: list[Path] = []
        for of_object in self.directory.iterdir():
            with suppress(OSError):  # no directory, or one that has just gone
                found += (path for path in of_object.iterdir() if path.is_dir())
        return found

    def _count(self) -> int:
        return sum(map(_bytes_in, self._versions()))

    def _stop(self, reason: str) -> None:
        """Keep nothing more in this process; what is there is read on."""
        with self._changed:
            if not self._keeps:
                return
            self._keeps = False
            self._changed.notify_all()
        logger.warning("%s; from now on, what is read from object stores is not kept on this node", reason)


@cache
def _cache_at(directory: str, limit_bytes: int | None) -> NodeCache | None:
    try:
        place = home_expanded(directory) / f"engine_loader-weights-{os.geteuid()}"
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = place.lstat()
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o022 or place.is_symlink():
            raise PermissionError(errno.EPERM, "others may write there")
        _remove_leftovers(place)
    except OSError as error:
        blocked = why_no_directory(directory)
        reason = f"{directory}: {blocked}" if blocked else f"{error.filename or directory}: {error.strerror}"
        logger.warning("loader.cache_directory: %s; weights are not kept on this node", reason)
        return None
    made = NodeCache(place, limit_bytes)
    atexit.register(made.flush, _EXIT_S)
    return made


def _write_whole(path: Path, content: memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        left = content
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
        with suppress(OSError):  # the engine has these bytes: its own files need the memory more
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_leftovers(directory: Path) -> None:
    """Delete what processes left that were killed while they wrote."""
    for path in directory.glob(f"*/*/{_UNFINISHED}-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFT_OVER_S:
                path.unlink()


def _bytes_in(version: Path) -> int:
    total = 0
    with suppress(OSError):
        for entry in os.scandir(version):
            with suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def _last_use(version: Path) -> float:
    try:
        return (version / _USED).stat().st_mtime
    except OSError:
        return 0.0
