"""Which failures of a read are retried, and the errors for failures that are not."""

from __future__ import annotations

import errno
import os

from .errors import TransferError, system_failure

RETRYABLE = frozenset({errno.EINTR, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO})
"""Errors that can be temporary. EIO and ESTALE are on network file systems (a server that fails over)."""

_HINTS = {
    errno.EIO: "the storage reports an error: look at the kernel log, the disk's health or the mount",
    errno.ESTALE: "the network file system lost the file: remount it, or was the file replaced while it was read?",
    errno.EREMOTEIO: "the storage server reports an error: look at its health",
    errno.ETIMEDOUT: "the storage did not answer in time: look at the mount and the network",
    errno.EACCES: "no permission: check owner and mode of the file, and the user that the engine runs as",
    errno.EPERM: "not permitted: check the mount's options and the container's security profile",
    errno.EMFILE: "too many open files in this process: raise `ulimit -n`",
    errno.ENFILE: "too many open files on this machine: raise fs.file-max",
    errno.ENOMEM: "not enough memory: lower buffer_bytes or give the container more",
    errno.ENOSPC: "no space left on the device",
    errno.EISDIR: "this is a directory where a file is meant",
    errno.ENOENT: "check the path; was the file removed or renamed?",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.ELOOP: "too many symbolic links: do they point at each other?",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ENODEV: "the device is gone: is the file system still mounted?",
    errno.ENXIO: "the device is gone: is the file system still mounted?",
    errno.EBADF: "the file was closed while it was being read",
}


def errno_hint(code: int | None) -> str | None:
    """What a person can do about an errno; None if there is no advice for it."""
    return None if code is None else _HINTS.get(code)


def io_error(path: str, offset: int | None, code: int | None, *, tries: int = 1, doing: str = "read") -> TransferError:
    """The error for a system call on ``path`` that failed with errno ``code`` and is not tried again."""
    name = errno.errorcode.get(code, str(code)) if code else "unknown error"
    text = os.strerror(code) if code else "unknown error"
    after = f" after {tries} tries" if tries > 1 else ""
    message = f"could not {doing}: {text} [{name}]{after}"
    return system_failure(code, message, file=path, offset=offset, hint=errno_hint(code))


def end_of_file(path: str, offset: int, size: int) -> TransferError:
    """The error for a file that became shorter than the ``size`` that it had when it was opened."""
    return TransferError(
        f"the file ended here while it was being read; it had {size} bytes when it was opened",
        file=path,
        offset=offset,
        hint="was the file cut short or replaced meanwhile? copy it again, and load when nothing writes to it",
    )


def deadline_passed(path: str, offset: int, seconds: float) -> TransferError:
    """The error for a read that made no progress for ``seconds``."""
    error = TransferError(f"no byte came for {seconds:g} s", file=path, offset=offset, hint=_HINTS[errno.ETIMEDOUT])
    error.errno = errno.ETIMEDOUT
    return error
