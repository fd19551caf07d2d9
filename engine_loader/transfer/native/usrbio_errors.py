"""What the native reader threads report about a file on 3FS, as an error for a person."""

from __future__ import annotations

import errno

from ...errors import TransferError
from ...sources.source import SourceFile, UsrbioAccess
from ...sources.threefs.read_failures import no_ring, no_room, read_failed, with_errno
from .library import FAIL_USRBIO, USRBIO_BUFFER, USRBIO_LIBRARY, USRBIO_MEMORY, Failure


def deadline_of(file: SourceFile | None, deadline_s: float) -> float:
    """After how many seconds without a byte a read of this file fails."""
    access = None if file is None else file.native_access
    return deadline_s if access is None else access.deadline_s


def usrbio_error(path: str, access: UsrbioAccess, info: Failure) -> TransferError:
    """The error for a failed transfer of the file ``path``."""
    if info.kind != FAIL_USRBIO and info.error == errno.ENODATA:
        message = f"3FS has no data here (ENODATA after {info.tries} tries): a hole, which its mount fills with zeros"
        hint = "is the file still being written? else data is lost: write it again"
        return with_errno(info.error, message, path, info.offset, hint)
    if info.kind != FAIL_USRBIO:
        return read_failed(path, info.offset, info.error, info.tries)
    step, code = info.tries, info.error
    if step == USRBIO_LIBRARY:
        hint = "is it of 3FS, and for this machine?"
        return with_errno(code, f"{access.library} cannot be used", path, None, hint)
    if step == USRBIO_MEMORY:
        # A row may reach a quarter beyond its IO; see native/src/usrbio/usrbio_channel.h.
        return no_room(path, access.depth * access.slot_io_bytes * 5 // 4, code)
    return no_ring(path, access.mount, "buffer" if step == USRBIO_BUFFER else "ring", code)
