"""What the kernel says of a file: its file system, and which of its pages lie in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache

IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
"""Names of file systems whose files lie in memory."""
_FILE_SYSTEMS = {
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x958458F6: "hugetlbfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x794C7630: "overlay",
    0x6969: "nfs",
    0x0BD00BD0: "lustre",
    0x00C36400: "ceph",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x65735546: "fuse",
    0x01021997: "9p",
    0x2FC12FC1: "zfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
}
_SYS_CACHESTAT = 451


def file_system(fd: int) -> str:
    """The name of an open file's file system; of one that is not known, its magic number in words."""
    number = _magic_number(fd)
    return _FILE_SYSTEMS.get(number, f"file system {number:#x}")


def _magic_number(fd: int) -> int:
    """Of the file system; 0 where the kernel does not say."""
    # `struct statfs` begins with the type, a word; the rest takes less than 128 bytes.
    answer = (ctypes.c_ulong * 32)()
    if _libc().fstatfs(ctypes.c_int(fd), answer) != 0:
        return 0
    return int(answer[0]) & 0xFFFFFFFF


def cached_pages(fd: int, offset: int, length: int) -> int | None:
    """How many pages of a range lie in the page cache; None where the kernel does not say.

    Args:
        fd: an open file.
        offset: a multiple of the page size.
        length: in bytes, more than 0.
    """
    found = _cachestat(fd, offset, length)
    return _mincore(fd, offset, length) if found is None else found


def _cachestat(fd: int, offset: int, length: int) -> int | None:
    """By the system call that Linux has since 6.5."""
    where = (ctypes.c_uint64 * 2)(offset, length)
    counts = (ctypes.c_uint64 * 5)()
    if _libc().syscall(ctypes.c_long(_SYS_CACHESTAT), ctypes.c_int(fd), where, counts, ctypes.c_uint(0)) != 0:
        return None
    return int(counts[0])


def _mincore(fd: int, offset: int, length: int) -> int | None:
    """By mapping the file; the kernel answers truthfully only to those who may write to it."""
    status = os.fstat(fd)
    if os.geteuid() not in (0, status.st_uid):
        return None
    states = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    try:
        # Private and writable: else Python does not tell where it lies. Nothing is written.
        with mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset) as mapped:
            first = ctypes.c_ubyte.from_buffer(mapped)
            place = ctypes.c_void_p(ctypes.addressof(first))
            failed = _libc().mincore(place, ctypes.c_size_t(length), states)
            del first
    except (OSError, ValueError):
        return None
    return None if failed else sum(state & 1 for state in bytes(states))


@cache
def _libc() -> ctypes.PyDLL:
    # These calls take microseconds. Giving up the GIL for each could cost 5 ms, beside a thread that is busy in Python.
    return ctypes.PyDLL(None, use_errno=True)
