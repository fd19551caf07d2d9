"""The window's part of the native library's C interface (native/src/window/window.h) for ctypes."""

from __future__ import annotations

import ctypes
from functools import cache

from ..native.library import Failure, File, load_library, load_quick


class WindowConfig(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("ahead", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("bytes", ctypes.c_uint64),
        ("slot_bytes", ctypes.c_uint64),
        ("directory", ctypes.c_char_p),
        ("reads", ctypes.c_void_p),
        ("copies", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("n_keys", ctypes.c_uint32),
        ("reserved2", ctypes.c_uint32),
    )


class SharedFile(ctypes.Structure):
    _fields_ = (("file", File), ("key", ctypes.c_uint64 * 2))


class SharedRegion(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_uint32),
        ("expected", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("most", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class WindowRead(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_uint32),
        ("file", ctypes.c_int32),
        ("offset", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
    )


class WindowStats(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_uint64),
        ("read_bytes", ctypes.c_uint64),
        ("shared_bytes", ctypes.c_uint64),
        ("left_bytes", ctypes.c_uint64),
        ("taken_over", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("waited_ns", ctypes.c_uint64),
        ("longest_wait_ns", ctypes.c_uint64),
        ("members", ctypes.c_uint32),
        ("most_members", ctypes.c_uint32),
        ("reading", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


@cache
def load_window() -> ctypes.CDLL:
    """The library with the window's functions declared, for calls that may wait.

    Raises:
        TransferError: as ``load_library``.
    """
    library = load_library()
    _declare(library)
    return library


@cache
def load_quick_window() -> ctypes.PyDLL:
    """The same for calls that end within microseconds: they keep the GIL."""
    quick = load_quick()
    _declare(quick)
    return quick


def _declare(library: ctypes.CDLL) -> None:
    handle, out, code = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int
    u32, i32, u64, i64 = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int64
    files, regions = ctypes.POINTER(SharedFile), ctypes.POINTER(SharedRegion)
    plan = (files, u32, regions, u32, handle, handle, u64)
    for name, result, arguments in (
        ("el_window_join", code, (ctypes.POINTER(WindowConfig), out)),
        ("el_window_leave", None, (handle,)),
        ("el_window_free", None, (handle,)),
        ("el_window_look", code, (handle, ctypes.POINTER(WindowStats))),
        ("el_shared_submit", code, (handle, *plan, i32, u64, out)),
        ("el_shared_wait", code, (handle, i64)),
        ("el_shared_bytes_done", u64, (handle,)),
        ("el_shared_left", u64, (handle, handle, u64)),
        ("el_shared_failure", code, (handle, ctypes.POINTER(Failure))),
        ("el_shared_cancel", code, (handle, i64)),
        ("el_shared_release", None, (handle,)),
        ("el_window_next_read", code, (handle, i64, ctypes.POINTER(WindowRead))),
        ("el_window_answer", code, (handle, u32, i32)),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
