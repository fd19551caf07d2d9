"""Copying to a bare device pointer, by the CUDA driver found at run time: for callers that give only an address."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

from ..errors import TransferError
from .protocol import Transfer

_CONTEXT, _MEMORY_TYPE, _MEMORY_DEVICE = 1, 2, 2  # CU_POINTER_ATTRIBUTE_..., CU_MEMORYTYPE_DEVICE
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE


def is_device_pointer(address: int) -> bool:
    """Whether an address is memory of a CUDA device."""
    driver = _driver()
    if driver is None or address == 0:
        return False
    kind = ctypes.c_uint()
    return driver.cuPointerGetAttribute(ctypes.byref(kind), _MEMORY_TYPE, ctypes.c_uint64(address)) == 0 and (
        kind.value == _MEMORY_DEVICE
    )


class DeviceWriter:
    """Two pinned host buffers: while one is copied to the device, the next part is read into the other.

    Args:
        address: where on the device.
        part_bytes: of each buffer.
    """

    def __init__(self, address: int, part_bytes: int) -> None:
        driver = _driver()
        assert driver is not None
        self._driver = driver
        self._address = address
        self._buffers = [mmap.mmap(-1, part_bytes) for _ in range(2)]
        self._addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in self._buffers]
        self._context = ctypes.c_void_p()
        self._check(driver.cuPointerGetAttribute(ctypes.byref(self._context), _CONTEXT, ctypes.c_uint64(address)))
        self._check(driver.cuCtxPushCurrent_v2(self._context))
        self._pinned = [
            at for at in self._addresses if driver.cuMemHostRegister_v2(ctypes.c_void_p(at), part_bytes, _PORTABLE) == 0
        ]
        self.part_bytes = part_bytes

    def write(self, nbytes: int, read: Callable[[int, int, int, object], Transfer]) -> None:
        """Fill ``nbytes`` of the device.

        Args:
            nbytes: how many.
            read: starts reading (offset, length) into a host address; its last argument keeps the memory there alive.

        Raises:
            TransferError: a read or a copy failed; nothing is in flight any more.
        """
        parts = [(start, min(self.part_bytes, nbytes - start)) for start in range(0, nbytes, self.part_bytes)]

        def start_read(number: int) -> Transfer:
            return read(*parts[number], self._addresses[number % 2], self._buffers[number % 2])

        reading = start_read(0) if parts else None
        try:
            for number, (start, length) in enumerate(parts):
                assert reading is not None
                reading.wait()
                if number + 1 < len(parts):
                    reading = start_read(number + 1)
                target, source = ctypes.c_uint64(self._address + start), ctypes.c_void_p(self._addresses[number % 2])
                self._check(self._driver.cuMemcpyHtoD_v2(target, source, ctypes.c_size_t(length)))
        except BaseException:
            if reading is not None:
                reading.cancel()
            raise

    def close(self) -> None:
        """Give the buffers back."""
        for address in self._pinned:
            self._driver.cuMemHostUnregister(ctypes.c_void_p(address))
        self._pinned = []
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _check(self, code: int) -> None:
        if code != 0:
            raise TransferError(f"the CUDA driver refused a copy to the device (error {code})")


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None
