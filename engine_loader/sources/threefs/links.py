"""The links below 3fs-virt/iovs by which 3FS's daemon knows our buffers and rings, and what a crash left of them.

Each ring, of the native reader threads (transfer/native/src/usrbio/usrbio_records.h) as of Python's, has a ledger in
/dev/shm: a file that lists its links, locked (flock) for as long as its process lives. The lock tells across PID
namespaces whether the process is there; where its /dev/shm is another one, there is no ledger to be seen and nothing is
touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from .shared_library import VIRTUAL_DIR

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_LEDGERS = "engine-loader-*.links"
_ID_DIGITS = 32
_OURS = re.compile(r"/.*/3fs-virt/iovs/[^/]+|/dev/shm/engine-loader-[^/]+")


def directory_of_links(mount: str) -> str:
    """The directory of a mount in which buffers and rings are registered."""
    return os.path.join(mount, VIRTUAL_DIR, "iovs")


class Ledger:
    """The list of one ring's links and shared memory, for whoever finds it when this process is dead.

    Args:
        name: of the ledger; each ring has another.
    """

    def __init__(self, name: str) -> None:
        self._path = _SHARED_MEMORY / f"engine-loader-{name}.links"
        unlocked = self._path.with_suffix(".new")
        self._fd = os.open(unlocked, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # before it has a name by which others find it
        unlocked.rename(self._path)

    def add(self, *paths: str) -> None:
        """List what is about to be made, or was."""
        os.write(self._fd, b"".join(os.fsencode(path) + b"\n" for path in paths))

    def close(self) -> None:
        """Remove the ledger, when nothing of what it lists is left."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


def remove_dead() -> int:
    """Remove the links and shared memory that dead processes of this user left; returns how many there were."""
    removed = 0
    for ledger in _SHARED_MEMORY.glob(_LEDGERS):
        with contextlib.suppress(OSError), _locked(ledger) as fd:
            for line in _content(fd).splitlines():
                removed += _remove(line)
            ledger.unlink(missing_ok=True)
    for record in _records_before():
        with contextlib.suppress(OSError), _locked(record) as fd:
            for path in _links_in(_content(fd)):
                removed += _remove(path)
            record.unlink(missing_ok=True)
    if removed:
        logger.info("removed %d links and buffers of 3FS that processes which are dead had left", removed)
    return removed


def ring_links_of_this_process(mount: str) -> list[str]:
    """The links of this process's rings: those to memory that is mapped here. For a binding that does not name them."""
    directory = directory_of_links(mount)
    mapped = Path("/proc/self/maps").read_text(errors="surrogateescape")
    rings = [os.path.join(directory, name) for name in os.listdir(directory) if ".r" in name]
    found = []
    for ring in rings:
        with contextlib.suppress(OSError):  # it is removed meanwhile
            if os.readlink(ring) in mapped:
                found.append(ring)
    return found


def _records_before() -> list[Path]:
    """Those of native rings before they had ledgers (0.1): in a directory that belongs to this user alone."""
    directory = _SHARED_MEMORY / f".engine-loader-3fs-{os.geteuid()}"
    with contextlib.suppress(OSError):
        status = directory.lstat()  # anybody may make a link of this name
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            return list(directory.iterdir())
    return []


def _links_in(record: str) -> list[str]:
    """The links of such a record: two ids of 32 digits, with which their names begin, and the mount."""
    ids = {record[:_ID_DIGITS], record[_ID_DIGITS : 2 * _ID_DIGITS]}
    directory = directory_of_links(record[2 * _ID_DIGITS :])
    names = (name for name in os.listdir(directory) if name.replace("-", "")[:_ID_DIGITS] in ids)
    return [os.path.join(directory, name) for name in names]


def _content(fd: int) -> str:
    return os.fsdecode(Path(f"/proc/self/fd/{fd}").read_bytes())


@contextlib.contextmanager
def _locked(ledger: Path) -> Iterator[int]:
    """A descriptor of the ledger. OSError: its process lives, or it is not ours."""
    fd = os.open(ledger, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise PermissionError(ledger)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def _remove(path: str) -> int:
    if not _OURS.fullmatch(path):
        return 0
    try:
        os.unlink(path)
    except OSError:
        return 0
    return 1
