"""Exchange of two names of one file system, at once: no moment is without either."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
"""How kernels, file systems (NFS, some of FUSE) and sandboxes refuse the call or the flag; renameat2(2)."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names; False where the kernel or the file system cannot do that.

    Raises:
        OSError: one of them does not exist, or may not be renamed.
    """
    number = _RENAMEAT2.get(os.uname().machine)
    if number is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    # By number: musl has had no function for it for long.
    status = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(one),
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(other),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
