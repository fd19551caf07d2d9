"""Locks between the processes of one node. The kernel releases a lock when its process ends, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..directories import STATE
from ..trust import make_private

_POLL_S = 0.05


class NodeLock:
    """An exclusive or shared flock on a file in the state directory of a cache."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / STATE / f"{name}.lock"
        self._descriptor = -1

    def acquire(self, timeout_s: float, *, shared: bool = False) -> bool:
        """Take the lock within ``timeout_s`` seconds (0: without waiting); whether it was taken."""
        make_private(self.path.parent)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + timeout_s
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                    os.close(descriptor)
                    if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                        return True  # a file system without locks: processes repeat each other's work, which is safe
                    raise
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(_POLL_S)
            else:
                self._descriptor = descriptor
                return True

    def release(self) -> None:
        """Release the lock, also for children that were forked while it was held."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def held(directory: Path, name: str, timeout_s: float) -> Iterator[bool]:
    """Hold a lock for a block; the value is whether it was taken."""
    lock = NodeLock(directory, name)
    taken = lock.acquire(timeout_s)
    try:
        yield taken
    finally:
        lock.release()
