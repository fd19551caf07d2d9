"""Whether devices can be used by the native library, and the errors of devices for a person."""

from __future__ import annotations

import os
from functools import cache

from ...errors import TransferError
from ..device_stream import DeviceStream
from .library import (
    DEVICE_LIBRARY,
    DEVICE_MEMORY,
    DEVICE_SELECT,
    DEVICE_THREAD,
    OK,
    DeviceFailure,
    Failure,
    load_quick,
)


@cache
def obstacle_to_devices(library: str | None = None) -> str | None:
    """Why native reader threads cannot put bytes on a device; None where it can.

    Args:
        library: path of the runtime of CUDA or HIP; None: the one that the process has loaded.
    """
    try:
        quick = load_quick()
    except TransferError as error:
        return error.message
    failure = DeviceFailure()
    if quick.el_device_runtime(None if library is None else os.fsencode(library), failure) == OK:
        return None
    return f"the runtime of CUDA or HIP cannot be used: {_text(failure)}"


def setup_error(device: int, failure: DeviceFailure) -> TransferError:
    """The error where a device cannot be prepared."""
    if failure.step == DEVICE_LIBRARY:
        return TransferError(
            f"the runtime of CUDA or HIP cannot be used: {_text(failure)}",
            hint="name its library in the setting device_runtime",
        )
    if failure.step == DEVICE_THREAD:
        return TransferError(f"no thread could be started: {os.strerror(failure.error)}", hint="raise the pids limit")
    what = {DEVICE_SELECT: "cannot be selected", DEVICE_MEMORY: "gets no page-locked memory"}
    hint = "lower device_pinned_bytes, or raise the limit of locked memory" if failure.step == DEVICE_MEMORY else None
    doing = what.get(failure.step, "gives no stream or event")
    return TransferError(f"device {device} {doing}: {_text(failure)} ({failure.error})", hint=hint)


def stream_error(target: DeviceStream, text: str) -> TransferError:
    """The error where an event on the stream of the destinations was refused."""
    return TransferError(f"device {target.device} refused an event on stream {target.stream:#x}: {text}")


def copy_error(path: str, info: Failure, text: str) -> TransferError:
    """The error where a copy to the device failed, or could not begin."""
    return TransferError(
        f"the copy to the device failed: {text}",
        file=path,
        offset=info.offset,
        hint="an error of the device, not of the file; after most of them the process must be started again",
    )


def copy_overdue(path: str, info: Failure, deadline_s: float) -> TransferError:
    """The error where a copy did not end."""
    return TransferError(
        f"a copy to the device did not end within {deadline_s:g} s",
        file=path,
        offset=info.offset,
        hint="does work before it, on the stream that owns the destination, never end? see deadline_s",
    )


def _text(failure: DeviceFailure) -> str:
    return bytes(failure.text).decode(errors="replace")
