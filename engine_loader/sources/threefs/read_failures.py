"""The errors of reads by USRBIO: what happened, and what to do."""

from __future__ import annotations

import errno
import os

from ...errors import TransferError
from ...failures import io_error

_MIB = 1 << 20
_EACCES_HINT = "3FS could not register the buffer in /dev/shm: is there room in it, and do daemon and client share it?"


def read_failed(path: str, offset: int, code: int, tries: int) -> TransferError:
    """The error for a read that 3FS ended with errno ``code`` for good."""
    error = io_error(path, offset, code, tries=tries, doing="read by USRBIO")
    # The file's mode was checked when the file was opened; here EACCES means the buffer.
    return with_errno(code, error.message, path, offset, _EACCES_HINT) if code == errno.EACCES else error


def no_room(path: str, buffer_bytes: int, code: int) -> TransferError:
    """The error for a /dev/shm that is too small."""
    hint = (
        "give the container more (docker: --shm-size; Kubernetes: an emptyDir of medium Memory), "
        "or lower usrbio_rings, usrbio_depth or io_bytes"
    )
    message = f"/dev/shm has no room for a buffer of {-(-buffer_bytes // _MIB)} MiB: {os.strerror(code)}"
    return with_errno(code, message, path, None, hint)


def no_ring(path: str, mount: str, what: str, code: int) -> TransferError:
    """The error for a buffer or a ring that 3FS refused."""
    hint = "is its daemon running, and may this user write to 3fs-virt/iovs?"
    return with_errno(code, f"3FS at {mount} made no {what}: {os.strerror(code)}", path, None, hint)


def no_answer(path: str, doing: str, seconds: float) -> TransferError:
    """The error for a call on the mount or to the library that does not return."""
    message = f"3FS did not answer for {seconds:g} s: {doing}"
    hint = "its daemon hangs: look at the daemon of this machine, and restart it"
    return with_errno(errno.ETIMEDOUT, message, path, None, hint)


def no_data(path: str, offset: int, nbytes: int) -> TransferError:
    """The error for bytes that 3FS has no data for, where the mount reads zeros."""
    message = f"3FS has no data for {nbytes} bytes here, though the mount reads them as zeros"
    hint = (
        "was the file completely written, and is a storage target lost? copy it to 3FS again; "
        "a file that has holes on purpose is read with backend: posix"
    )
    return with_errno(errno.ENODATA, message, path, offset, hint)


def with_errno(code: int, message: str, path: str, offset: int | None, hint: str) -> TransferError:
    """A TransferError with its errno."""
    error = TransferError(message, file=path, offset=offset, hint=hint)
    error.errno = code
    return error
