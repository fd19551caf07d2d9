"""Mounts that only a child of this process sees; call these in ``in_child``."""

import ctypes
import os
from pathlib import Path

_NEW_MOUNTS, _NEW_USERS = 0x20000, 0x10000000
_PRIVATE, _RECURSIVE, _BIND, _REMOUNT, _READ_ONLY = 1 << 18, 1 << 14, 1 << 12, 1 << 5, 1
_libc = ctypes.CDLL(None, use_errno=True)


def own_mounts() -> None:
    """Mounts of this process's own from here on; where it is not root, with a user namespace in which it is.

    Raises:
        OSError: this machine does not let it.
    """
    user, group = os.geteuid(), os.getegid()
    _check(_libc.unshare(_NEW_MOUNTS | (0 if user == 0 else _NEW_USERS)))
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _check(_libc.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None))


def mount_tmpfs(place: Path, options: str = "size=64m,mode=755") -> None:
    """An empty file system in memory at ``place``."""
    _check(_libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, options.encode()))


def bind(what: Path, place: Path) -> None:
    """Mount a directory at another place, as containers do with volumes of the host."""
    _check(_libc.mount(os.fsencode(what), os.fsencode(place), None, _BIND, None))


def make_read_only(place: Path) -> None:
    """A mount that can no longer be written."""
    bind(place, place)
    _check(_libc.mount(None, os.fsencode(place), None, _REMOUNT | _BIND | _READ_ONLY, None))


def make_writable(place: Path) -> None:
    """A directory of a read-only mount, as a volume that can be written."""
    bind(place, place)
    _check(_libc.mount(None, os.fsencode(place), None, _REMOUNT | _BIND, None))


def mounts_work() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    from .children import ChildDied, in_child

    try:
        in_child(own_mounts)
    except ChildDied:
        return False
    return True


def _check(status: int) -> None:
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
