"""The native library: where it is, how it is loaded, and its C interface (native/src/core/c_interface.h) for ctypes."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from ...errors import TransferError

_ABI_VERSION = 8
OK, TIMEOUT, FAILED = 0, 1, 2
E_CLOSED, E_FORKED, E_ARGUMENT, E_MEMORY, E_THREAD, E_DEVICE = -1, -2, -3, -4, -5, -6
FAIL_IO, FAIL_EOF, FAIL_DEADLINE, FAIL_CANCELLED, FAIL_USRBIO, FAIL_DEVICE = range(1, 7)
USRBIO_LIBRARY, USRBIO_MEMORY, USRBIO_BUFFER, USRBIO_RING = range(1, 5)
DEVICE_LIBRARY, DEVICE_SELECT, DEVICE_MEMORY, DEVICE_STREAM, DEVICE_THREAD = range(1, 6)
MODES = {"buffered": 0, "direct": 1, "mixed": 2, "usrbio": 3, "memory": 4}
FILE_WIDE, FILE_REMOTE = 1, 2
ORDERED = 1
HUGE_PAGES, ALWAYS_HUGE_PAGES = 1, 2
DEVICE_NO_SLOTS = 1


class Config(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("wide_threads", ctypes.c_uint32),
        ("max_tries", ctypes.c_uint32),
        ("retry_base_ms", ctypes.c_uint32),
        ("retry_cap_ms", ctypes.c_uint32),
        ("deadline_ms", ctypes.c_uint32),
        ("block_bytes", ctypes.c_uint64),
        ("direct_block_bytes", ctypes.c_uint64),
        ("gap_bytes", ctypes.c_uint64),
        ("wide_gap_bytes", ctypes.c_uint64),
        ("cpus", ctypes.POINTER(ctypes.c_uint32)),
        ("n_cpus", ctypes.c_uint32),
        ("most_wide_threads", ctypes.c_uint32),
    )


class File(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_int32),
        ("direct_fd", ctypes.c_int32),
        ("size", ctypes.c_uint64),
        ("mode", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("memory", ctypes.c_void_p),
    )


class UsrbioConfig(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("rings", ctypes.c_uint32),
        ("depth", ctypes.c_uint32),
        ("deadline_ms", ctypes.c_uint32),
        ("io_bytes", ctypes.c_uint64),
        ("library", ctypes.c_char_p),
        ("mount", ctypes.c_char_p),
        ("slot_io_bytes", ctypes.c_uint64),
        ("batch", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class DeviceConfig(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("streams", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pinned_bytes", ctypes.c_uint64),
        ("library", ctypes.c_char_p),
    )


class DeviceFailure(ctypes.Structure):
    _fields_ = (
        ("step", ctypes.c_uint32),
        ("error", ctypes.c_int32),
        ("text", ctypes.c_char * 200),
    )


class Failure(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("error", ctypes.c_int32),
        ("file", ctypes.c_uint32),
        ("extent", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("tries", ctypes.c_uint32),
        ("in_flight", ctypes.c_uint32),
    )


COUNTERS = (
    "bytes",
    "reads",
    "retries",
    "short_reads",
    "overread_bytes",
    "buffered_bytes",
    "direct_bytes",
    "direct_straight_bytes",
    "direct_refused",
    "read_ns",
    "scatter_ns",
    "backoff_ns",
    "idle_ns",
    "wait_ns",
    "usrbio_bytes",
    "device_bytes",
    "slot_wait_ns",
    "threads",
)


class Stats(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in COUNTERS)


def library_path() -> Path:
    """Where ``pip install`` puts the library."""
    return Path(__file__).with_name("libengine_loader_native.so")


INSTALL_AGAIN = (
    "ENGINE_LOADER_NATIVE_BUILD=require pip install --no-cache-dir --force-reinstall --no-deps engine-loader"
)
"""pip keeps the wheel that it built, also one without the native library: without all of this line it is installed
again from its cache, and nothing is said.
"""


@cache
def load_library() -> ctypes.CDLL:
    """The library, with its functions declared.

    Raises:
        TransferError: it is not there or cannot be used; the message says why.
    """
    path = library_path()
    hint = f"install a C++17 compiler (apt-get install g++), then: {INSTALL_AGAIN}"
    if not path.exists():
        raise TransferError("the native library was not built when this package was installed", file=path, hint=hint)
    try:
        library = ctypes.CDLL(os.fspath(path), use_errno=True)
        version = library.el_abi_version()
    except (OSError, AttributeError) as error:
        raise TransferError(f"the native library cannot be loaded: {error}", file=path, hint=hint) from error
    if version != _ABI_VERSION:
        raise TransferError(
            f"the native library is of another build of this package (interface {version}, not {_ABI_VERSION})",
            file=path,
            hint=INSTALL_AGAIN,
        )
    _declare(library)
    return library


@cache
def load_quick() -> ctypes.PyDLL:
    """The same library for calls that end within microseconds: they keep the GIL.

    Beside a thread that is busy in Python, getting the GIL back after a call takes 5 ms.
    """
    library = load_library()
    quick = ctypes.PyDLL(library._name, handle=library._handle, use_errno=True)
    _declare(quick)
    return quick


def _declare(library: ctypes.CDLL) -> None:
    handle, out = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    u32, u64, i64, code = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int
    files, config = ctypes.POINTER(File), ctypes.POINTER(Config)
    for name, result, arguments in (
        ("el_readers_create", handle, (config, ctypes.POINTER(code))),
        ("el_readers_place", code, (handle, ctypes.POINTER(u32), u32)),
        ("el_readers_close", code, (handle, i64)),
        ("el_readers_destroy", None, (handle,)),
        ("el_stats", code, (handle, ctypes.POINTER(Stats))),
        ("el_direct_flags", code, (ctypes.c_int32,)),
        ("el_submit", code, (handle, files, u32, ctypes.c_void_p, u64, u32, out)),
        ("el_submit_to_device", code, (handle, files, u32, ctypes.c_void_p, u64, u32, u32, u64, out)),
        ("el_device_runtime", code, (ctypes.c_char_p, ctypes.POINTER(DeviceFailure))),
        ("el_device_add", code, (handle, ctypes.POINTER(DeviceConfig), ctypes.POINTER(DeviceFailure))),
        ("el_device_error_text", None, (handle, u32, ctypes.c_int32, ctypes.c_char_p, u64)),
        ("el_usrbio_add", code, (handle, ctypes.POINTER(UsrbioConfig))),
        ("el_wait", code, (handle, i64, i64)),
        ("el_bytes_done", u64, (handle,)),
        ("el_completed", u64, (handle, u64, ctypes.c_void_p, u64)),
        ("el_cancel", code, (handle, i64)),
        ("el_failure", code, (handle, ctypes.POINTER(Failure))),
        ("el_retried", code, (handle, ctypes.POINTER(Failure))),
        ("el_file_times", code, (handle, ctypes.c_void_p, ctypes.c_void_p, u32)),
        ("el_release", None, (handle,)),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
