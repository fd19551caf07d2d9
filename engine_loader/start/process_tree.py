"""Children that another process has forked: how a process becomes their parent.

An orphan goes to the nearest ancestor that adopts orphans (PR_SET_CHILD_SUBREAPER of prctl(2), Linux 3.4). So a process
that asks its template for a child adopts while it waits, and has then a child as any other: it can wait for it and see
its exit status, whatever becomes of the template.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

_SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 36, 37


class TreeError(Exception):
    """A process did not become a child of the one that asked for it."""


@contextmanager
def adopting() -> Iterator[None]:
    """Orphans among this process's descendants become its children meanwhile.

    Raises:
        TreeError: the system has no such thing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    if libc.prctl(_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) or libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise TreeError(f"this system gives orphans to no one but init ({os.strerror(ctypes.get_errno())})")
    try:
        yield
    finally:
        libc.prctl(_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def fork_orphan(become: Callable[[], NoReturn], parent: int) -> int:
    """The process id of a process that runs ``become`` and is a child of the process ``parent``, which is adopting.

    Raises:
        TreeError: it has another parent, or was gone at once; it was ended.
        OSError: there is no memory, or there are too many processes.
    """
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            os.close(read)
            pid = os.fork()
            if pid == 0:
                os.close(write)
                become()
            os.write(write, str(pid).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(between, 0)
    if not said:
        raise TreeError("no process could be forked")
    pid = int(said)
    if parent_of(pid) != parent:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        raise TreeError(f"the new process is a child of {parent_of(pid)}, not of {parent}")
    return pid


def parent_of(pid: int) -> int | None:
    """The parent of a process; None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None
