"""Rings and buffers from Python by ctypes, with the interface of the binding ``hf3fs_py_usrbio``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import uuid
from datetime import timedelta
from typing import Any, Self

from .shared_library import VIRTUAL_DIR, ThreeFsLibrary


class _Iov(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("iovh", ctypes.c_void_p),
        ("id", ctypes.c_uint8 * 16),
        ("mount_point", ctypes.c_char * 256),
        ("size", ctypes.c_size_t),
        ("block_size", ctypes.c_size_t),
        ("numa", ctypes.c_int),
    )


class _Ior(ctypes.Structure):
    _fields_ = (
        ("iov", _Iov),
        ("iorh", ctypes.c_void_p),
        ("mount_point", ctypes.c_char * 256),
        ("for_read", ctypes.c_bool),
        ("io_depth", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("timeout", ctypes.c_int),
        ("flags", ctypes.c_uint64),
    )


class _Cqe(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("result", ctypes.c_int64),
        ("userdata", ctypes.c_void_p),
    )


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Rings:
    """The binding's module functions and classes over one library."""

    def __init__(self, library: ThreeFsLibrary) -> None:
        self._library = library

    def extract_mount_point(self, path: str) -> str | None:
        return self._library.mount_point(path)

    def register_fd(self, fd: int, flags: int = 0) -> None:
        self._library.register(fd)

    def deregister_fd(self, fd: int) -> None:
        self._library.deregister(fd)

    def iovec(self, buffer: Any, id: str, mount: str, block_size: int = 0, numa: int = -1) -> Iovec:
        return Iovec(self._library, buffer, id, mount, block_size, numa)

    def ioring(
        self, mount: str, entries: int, for_read: bool = True, io_depth: int = 0, *, flags: int = 0, **_: Any
    ) -> Ioring:
        return Ioring(self._library, mount, entries, for_read, io_depth, flags)


class Iovec:
    """A buffer, or a slice of one, and the result of an IO into it."""

    def __init__(
        self, library: ThreeFsLibrary, buffer: Any, id: str, mount: str, block_size: int = 0, numa: int = -1
    ) -> None:
        self._memory = (ctypes.c_char * memoryview(buffer).nbytes).from_buffer(buffer)
        self.address = ctypes.addressof(self._memory)
        self.size = memoryview(buffer).nbytes
        self.base_off = 0
        self.result = 0
        self.userdata: object = None
        self.native = _Iov()
        error = library.calls.hf3fs_iovwrap(
            ctypes.byref(self.native),
            self.address,
            uuid.UUID(id).bytes,
            os.fsencode(mount),
            self.size,
            block_size,
            numa,
        )
        if error < 0:
            raise OSError(-error, os.strerror(-error))

    def __getitem__(self, where: slice) -> Iovec:
        start, stop, step = where.indices(self.size)
        if step != 1:
            raise ValueError("step not 1 when slicing iovec")
        part = Iovec.__new__(Iovec)
        part._memory, part.native = self._memory, self.native
        part.address, part.size, part.base_off = self.address + start, max(0, stop - start), self.base_off + start
        part.result, part.userdata = 0, None
        return part


class Ioring:
    """A ring: one thread prepares and submits, one waits.

    Attributes:
        link_name: of the link below 3fs-virt/iovs by which the daemon knows the ring. The library makes it with the
            flags in base 2 and removes one with the flags in base 10, so ``link_name`` is removed before the ring is.
    """

    def __init__(
        self, library: ThreeFsLibrary, mount: str, entries: int, for_read: bool, io_depth: int, flags: int = 0
    ) -> None:
        self._calls = library.calls
        self._native = _Ior()
        self._slots: dict[int, Iovec] = {}
        self._pid = os.getpid()
        error = self._calls.hf3fs_iorcreate4(
            ctypes.byref(self._native), os.fsencode(mount), entries, for_read, io_depth, 0, -1, flags
        )
        identity = uuid.UUID(bytes=bytes(self._native.iov.id))
        kind = "r" if for_read else "w"
        self.link_name = f"{identity}.{kind}{io_depth}.t0" + (f".f{flags:b}" if flags else "")
        if error < 0:  # perhaps after the link was made; the library would remove one of another name
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(mount, VIRTUAL_DIR, "iovs", self.link_name))
            raise OSError(-error, os.strerror(-error))

    def prepare(self, iov: Iovec, read: bool, fd: int, off: int, userdata: object = None) -> Self:
        slot = self._calls.hf3fs_prep_io(
            ctypes.byref(self._native), ctypes.byref(iov.native), read, iov.address, fd, off, iov.size, None
        )
        if slot < 0:
            raise OSError(-slot, os.strerror(-slot))
        iov.userdata = userdata
        self._slots[slot] = iov
        return self

    def submit(self) -> Self:
        error = self._calls.hf3fs_submit_ios(ctypes.byref(self._native))
        if error < 0:
            raise OSError(-error, os.strerror(-error))
        return self

    def wait(self, *, max_results: int = 0, min_results: int = 0, timeout: timedelta | None = None) -> list[Iovec]:
        capacity = max(max_results, min_results, 1)
        now = time.time_ns()
        # Without a time-out the binding waits for ever for `min_results`, and not at all for more.
        until = None if timeout is None and min_results else now + round((timeout or timedelta()).total_seconds() * 1e9)
        limit = None if until is None else ctypes.byref(_Timespec(*divmod(until, 10**9)))
        cqes = (_Cqe * capacity)()
        count = self._calls.hf3fs_wait_for_ios(ctypes.byref(self._native), cqes, capacity, min_results, limit)
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        done = []
        for cqe in cqes[:count]:
            iov = self._slots.pop(cqe.index)
            iov.result = cqe.result
            done.append(iov)
        return done

    def destroy(self) -> None:
        self._calls.hf3fs_iordestroy(ctypes.byref(self._native))

    def __del__(self) -> None:
        if os.getpid() == self._pid:  # in a forked child, the ring belongs to the parent
            self.destroy()
