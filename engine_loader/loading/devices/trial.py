"""A trial of placing bytes on a device, before anything depends on it: a few megabytes are read there and compared.

What a driver, a container or a virtual GPU may get wrong shows here, in milliseconds, as a reason to let torch copy
instead. That copies keep their order is a matter of the native library, and is tested (tests/cuda).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import torch

from ...errors import TransferError
from ...sources.posix import PosixSource
from ...transfer.device_stream import DeviceStream
from ...transfer.native.native_readers import NativeReaders
from ...transfer.plan import extent, make_extents

if TYPE_CHECKING:
    from ...settings import LoaderSettings

_BLOCK_BYTES = 256 << 10
_PLAIN_BYTES = (2 << 20) + 12_345
_ROWS, _ROW_BYTES, _SOURCE_STRIDE, _TARGET_STRIDE = 500, 100, 1000, 333
_UNTOUCHED = 0xA5


class Memory(Protocol):
    """The memory of the device that is tried."""

    def stream(self, number: int) -> int: ...
    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor: ...
    def read_back(self, tensor: torch.Tensor) -> torch.Tensor: ...


def obstacle_on(memory: Memory, device: torch.device, number: int, settings: LoaderSettings) -> str | None:
    """Why bytes should not be placed on a device; None where they arrived as they should.

    Args:
        memory: of the device.
        device: as torch knows it.
        number: as the runtime does.
        settings: which runtime.
    """
    content = torch.arange(_PLAIN_BYTES + _ROWS * _SOURCE_STRIDE, dtype=torch.int32).mul(40_503).bitwise_right_shift(7)
    content = content.to(torch.uint8)
    rows = content[_PLAIN_BYTES:].view(_ROWS, _SOURCE_STRIDE)[:, :_ROW_BYTES]
    expected = torch.full((_PLAIN_BYTES + _ROWS * _TARGET_STRIDE,), _UNTOUCHED, dtype=torch.uint8)
    expected[:_PLAIN_BYTES] = content[:_PLAIN_BYTES]
    expected[_PLAIN_BYTES:].view(_ROWS, _TARGET_STRIDE)[:, :_ROW_BYTES] = rows
    try:
        found = _placed(memory, device, number, settings, content, len(expected))
    except (TransferError, OSError, RuntimeError) as error:
        return f"a trial of {device} failed: {error}"
    wrong = int((found != expected).sum())
    return f"in a trial of {device}, {wrong} of {len(expected)} bytes were wrong" if wrong else None


def _placed(
    memory: Memory, device: torch.device, number: int, settings: LoaderSettings, content: torch.Tensor, nbytes: int
) -> torch.Tensor:
    """What is on the device after ``content`` was read there from a file: the plain bytes, then the rows."""
    descriptor = os.memfd_create("engine-loader-trial", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as writing:
            writing.write(content.numpy().data)
        file = PosixSource().open(f"/proc/self/fd/{descriptor}")
        target = memory.empty(nbytes, device)
        target.fill_(_UNTOUCHED)  # which our copies have to come after
        address = target.data_ptr()
        plan = make_extents(
            [
                extent(0, 0, _PLAIN_BYTES, address),
                (0, _ROWS, _PLAIN_BYTES, _ROW_BYTES, _SOURCE_STRIDE, address + _PLAIN_BYTES, _TARGET_STRIDE),
            ]
        )
        readers = NativeReaders(
            2,
            block_bytes=_BLOCK_BYTES,
            deadline_s=min(10.0, settings.deadline_s),
            read_mode="buffered",
            pinned_bytes=4 * _BLOCK_BYTES,
            device_runtime=settings.device_runtime,
        )
        try:
            readers.submit_to_device([file], plan, DeviceStream(number, memory.stream(number)), owner=target).wait()
        finally:
            readers.close()
            file.close()
        return memory.read_back(target)
    finally:
        os.close(descriptor)
