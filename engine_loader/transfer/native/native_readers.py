"""The native reader threads: native/*.cpp behind the interface of protocol.py.

The library is plain C and knows nothing of Python: its threads never need the GIL, and calls that wait release it.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...sources.source import SourceFile, UsrbioAccess
from ..cpus import cpus_of_node, default_threads, local_cpus, waiting_threads
from ..device_stream import DeviceStream
from ..modes import ReadMode, by_page_cache, choose_mode
from ..placement import node_of_gpu, node_of_storage
from ..plan import EXTENT, Extents, check_plan, files_of_plan, plan_bytes
from ..protocol import TransferStatistics
from ..retries import FileTimes, RetryLog
from ..stocked import from_stock
from .device_errors import setup_error, stream_error
from .library import (
    ALWAYS_HUGE_PAGES,
    COUNTERS,
    DEVICE_NO_SLOTS,
    E_DEVICE,
    E_FORKED,
    HUGE_PAGES,
    OK,
    ORDERED,
    TIMEOUT,
    Config,
    DeviceConfig,
    DeviceFailure,
    File,
    Stats,
    UsrbioConfig,
    library_path,
    load_library,
    load_quick,
)
from .opened import OpenFile, native_file, opened_as
from .transfer import CANCEL_GRACE_S, SLICE_MS, NativeTransfer, call_error, stuck

__all__ = ["NativeReaders", "NativeTransfer", "library_path", "load_library"]

logger = logging.getLogger(__name__)

DEFAULT_PINNED_BYTES = 256 << 20
# With the quarter that a block may be longer, a thread's scratch memory is one huge page.
_DIRECT_BLOCK_BYTES = 1536 << 10
_MOST_RINGS = 4
_FEW_LIVE = 32
_MOMENT_MS = 2
_MANY_EXTENTS = 20_000
"""So many take milliseconds to plan; other Python threads may run meanwhile."""

_all_readers: weakref.WeakSet[NativeReaders] = weakref.WeakSet()


@atexit.register
def _close_all_readers() -> None:
    """Stop writing before the interpreter frees the destinations of transfers that are still in flight."""
    for readers in list(_all_readers):
        readers.close()


class NativeReaders:
    """Native threads that read by ``preadv``.

    Args:
        threads: how many read at once; None: as many as there are CPUs for each of the ``ranks``; where reads wait for
            storage, 8 at first, and up to 64 for all ranks together as long as more bring more.
        block_bytes: the largest single read.
        direct_block_bytes: the largest one by O_DIRECT from a disk of this machine; None: at most 1.5 MiB.
        ranks: processes that load at the same time and share this machine's CPUs.
        max_tries: how often a read is tried when its error may pass.
        retry_delay_s: the wait before the second try; it doubles with every further one, up to 2 s.
        deadline_s: when a read gets no byte for this long, its transfer fails.
        read_mode: "buffered" or "direct"; anything else: see modes.py.
        huge_pages: ask for huge pages for large destinations, which mostly makes fresh memory several times faster to
            fill: where they are made sooner than small ones (True), never (False), or whatever they cost ("always").
        pinned_bytes: page-locked memory for what is on its way to a device, for each one.
        device_runtime: path of the runtime of CUDA or HIP; None: the one that the process has loaded.

    Attributes:
        by_page_cache: read by way of the page cache what would be read past it, unless that was asked for by name: for
            processes that read the same bytes and have no other way to share them.

    Raises:
        TransferError: the library cannot be loaded.
    """

    name = "cpp"

    def __init__(
        self,
        threads: int | None = None,
        *,
        block_bytes: int = 4 << 20,
        direct_block_bytes: int | None = None,
        ranks: int = 1,
        max_tries: int = 5,
        retry_delay_s: float = 0.05,
        deadline_s: float = 120.0,
        read_mode: str = "auto",
        huge_pages: bool | Literal["always"] = True,
        pinned_bytes: int = DEFAULT_PINNED_BYTES,
        device_runtime: str | None = None,
    ) -> None:
        self._handle: int | None = None
        self._library = load_library()
        self._quick = load_quick()
        self.threads = threads or default_threads(local_cpus(), ranks)
        self._placed = False
        self.deadline_s = deadline_s
        self._read_mode = read_mode
        self.by_page_cache = False
        self._pinned_bytes = pinned_bytes
        self._device_runtime = device_runtime
        self._devices: dict[int, int] = {}  # the library's number by the runtime's
        self._with_slots: set[int] = set()  # devices with page-locked memory, which 3FS's rings need none of
        self._lock = threading.Lock()
        self._live: set[NativeTransfer] = set()
        self._look_at = 1
        self._open_files: weakref.WeakKeyDictionary[SourceFile, OpenFile] = weakref.WeakKeyDictionary()
        self._closed = False
        self._pid = os.getpid()
        self._last_statistics = Stats()
        self._bytes_ahead = 0
        self.retries, self.times = RetryLog(), FileTimes()
        direct_block_bytes = direct_block_bytes or min(block_bytes, _DIRECT_BLOCK_BYTES)
        largest = max(block_bytes, direct_block_bytes)
        first, most = (threads, threads) if threads else waiting_threads(self.threads, largest, ranks)
        config = Config(
            struct_bytes=ctypes.sizeof(Config),
            flags=ALWAYS_HUGE_PAGES if huge_pages == "always" else HUGE_PAGES if huge_pages else 0,
            threads=self.threads,
            wide_threads=first,
            most_wide_threads=most,
            max_tries=max_tries,
            retry_base_ms=max(1, round(retry_delay_s * 1e3)),
            deadline_ms=max(1, min(round(deadline_s * 1e3), 0xFFFFFFFF)),
            block_bytes=block_bytes,
            direct_block_bytes=direct_block_bytes,
        )
        error = ctypes.c_int()
        self._handle = self._quick.el_readers_create(config, error)
        if self._handle is None:
            raise call_error(error.value)
        _all_readers.add(self)

    def submit(
        self, files: Sequence[SourceFile], extents: Extents, *, ordered: bool = True, owner: object = None
    ) -> NativeTransfer:
        return self._submit(files, extents, ordered, owner, None)

    def submit_to_device(
        self,
        files: Sequence[SourceFile],
        extents: Extents,
        target: DeviceStream,
        *,
        ordered: bool = True,
        owner: object = None,
    ) -> NativeTransfer:
        """``submit`` for destinations in the memory of a device.

        The copies come after everything that is on ``target.stream`` now. When an extent, or the transfer, is complete,
        so are its copies: what is launched afterwards, on any stream, sees the bytes. Once the transfer is complete,
        has failed, or ``cancel`` has returned, no copy is in flight.

        Raises:
            CheckpointError: an extent reaches beyond its file.
            TransferError: the device cannot be used.
        """
        return self._submit(files, extents, ordered, owner, target)

    def _submit(
        self, files: Sequence[SourceFile], extents: Extents, ordered: bool, owner: object, target: DeviceStream | None
    ) -> NativeTransfer:
        if os.getpid() != self._pid:
            raise call_error(E_FORKED)
        extents = np.ascontiguousarray(extents, dtype=EXTENT)
        files, extents = files_of_plan(files, extents)
        check_plan(extents, files)
        files, extents, bytes_ahead = from_stock(files, extents)
        if bytes_ahead:
            files, extents = files_of_plan(files, extents)
        rings_only = all(file.native_access is not None for file in files)
        device = None if target is None else self.add_device(target.device, slots=not rings_only)
        opened = [self._open(file) for file in files]
        if not self._placed:
            self._place(files, opened, target)
        native = (File * len(files))(*map(native_file, files, opened))
        handle = ctypes.c_void_p()
        flags = ORDERED if ordered else 0
        library = self._quick if len(extents) < _MANY_EXTENTS else self._library
        plan = (self._handle, native, len(files), extents.ctypes.data, len(extents), flags)
        if target is None:
            result = library.el_submit(*plan, handle)
        else:
            result = library.el_submit_to_device(*plan, device, target.stream, handle)
        if result == E_DEVICE and target is not None and device is not None:
            raise stream_error(target, self.device_error(device, ctypes.get_errno()))
        if result != OK:
            raise call_error(result)
        self._bytes_ahead += bytes_ahead
        owners = (owner, opened)
        return self._register(NativeTransfer(self, handle, plan_bytes(extents), list(files), owners, device=device))

    def _place(self, files: Sequence[SourceFile], opened: Sequence[OpenFile], target: DeviceStream | None) -> None:
        """Keep the threads on one memory node.

        The node of the GPU that is read to; else that of the disk that is read from; else the caller's, where what was
        read will be used.
        """
        self._placed = True
        if target is not None:
            cpus = cpus_of_node(node_of_gpu(target.device))
        else:
            waited_for = (file.fileno() for file, how in zip(files, opened, strict=True) if how.mode.wide)
            disks = {node_of_storage(fd) for fd in waited_for if fd is not None}
            cpus = cpus_of_node(disks.pop()) if len(disks) == 1 else None
        cpus = cpus or local_cpus()
        if cpus is not None and len(cpus) >= self.threads:
            self._quick.el_readers_place(self._handle, (ctypes.c_uint32 * len(cpus))(*sorted(cpus)), len(cpus))

    def statistics(self) -> TransferStatistics:
        stats = self._stats()
        modes = {"buffered": stats.buffered_bytes, "direct": stats.direct_bytes, "usrbio": stats.usrbio_bytes}
        return TransferStatistics(
            bytes_read=stats.bytes,
            overread_bytes=stats.overread_bytes,
            reads=stats.reads,
            retries=stats.retries,
            first_retry=self.retries.first,
            slowest_file=self.times.slowest(),
            short_reads=stats.short_reads,
            bytes_ahead=self._bytes_ahead,
            read_seconds=stats.read_ns / 1e9,
            modes={name: nbytes for name, nbytes in modes.items() if nbytes},
        )

    def counters(self) -> dict[str, int]:
        """Every count of the library (``el_stats_info`` in native/src/core/c_interface.h), by name."""
        stats = self._stats()
        return {name: int(getattr(stats, name)) for name in COUNTERS}

    def close(self) -> None:
        try:
            self._close()
        except KeyboardInterrupt:
            self._close()  # whoever still holds them, or a transfer of theirs, would keep the threads
            raise

    def _close(self) -> None:
        if self._closed or self._handle is None:
            return
        end = time.monotonic() + CANCEL_GRACE_S
        # Idle threads end within a moment, so the GIL is kept for that long.
        result = self._quick.el_readers_close(self._handle, _MOMENT_MS)
        while result == TIMEOUT and time.monotonic() < end:
            result = self._library.el_readers_close(self._handle, SLICE_MS)
        if result == E_FORKED:
            return
        self._last_statistics = self._stats()
        self._closed = True
        for transfer in list(self._live):
            transfer.forget_if_quiet()
        # What a thread hangs in is left to it; it ends when its read comes back.
        stuck.update(self._live)
        self._live.clear()
        self._open_files.clear()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()
            self._library.el_readers_destroy(self._handle)

    def device_error(self, device: int, code: int) -> str:
        """What the runtime says to one of its errors."""
        text = ctypes.create_string_buffer(200)
        self._quick.el_device_error_text(self._handle, device, code, text, len(text))
        return f"{text.value.decode(errors='replace')} ({code})"

    def transfer_ended(self, transfer: NativeTransfer) -> None:
        """Forget a transfer that will not write any more."""
        self._live.discard(transfer)
        stuck.discard(transfer)

    def _register(self, transfer: NativeTransfer) -> NativeTransfer:
        # Transfers that nobody waited for have to give up their owners at some time, many of them not at every submit.
        if len(self._live) >= self._look_at:
            for other in list(self._live):
                other.forget_if_quiet()
            self._look_at = 1 if len(self._live) < _FEW_LIVE else 2 * len(self._live)
        for other in list(stuck):
            other.forget_if_quiet()
        self._live.add(transfer)
        return transfer

    def _open(self, file: SourceFile) -> OpenFile:
        with self._lock:
            by_cache = self.by_page_cache and self._read_mode == "auto"
            found = self._open_files.get(file)
            if by_cache and found is not None and by_page_cache(found.mode) is not found.mode:
                found = None  # transfers that are under way keep theirs
            if found is None:
                access = file.native_access
                if access is not None:
                    found = OpenFile(
                        ReadMode("usrbio", True, f"on 3FS at {access.mount}"), -1, self._add_usrbio(access) << 8
                    )
                else:
                    mode = choose_mode(file, self._read_mode)
                    found = opened_as(file, by_page_cache(mode) if by_cache else mode)
                self._open_files[file] = found
                logger.debug("%s is read %s (%s)", file.path, found.mode.name, found.mode.reason)
            return found

    def waits_for_storage(self, file: SourceFile) -> bool:
        """Whether reads of a file wait for storage, rather than copy what lies in this machine's page cache."""
        return self._open(file).mode.wide

    def native_file(self, file: SourceFile) -> File:
        """A file as the library takes it; its descriptors stay open as long as the file and the readers."""
        return native_file(file, self._open(file))

    @property
    def handle(self) -> int | None:
        """The library's handle; None once they are gone."""
        return self._handle

    def add_device(self, device: int, *, slots: bool = True) -> int:
        """The number by which the library knows a device; ``slots``: for which it has page-locked memory."""
        with self._lock:
            number = self._devices.get(device)
            if number is None or (slots and device not in self._with_slots):
                library = self._device_runtime
                config = DeviceConfig(
                    struct_bytes=ctypes.sizeof(DeviceConfig),
                    device=device,
                    flags=0 if slots else DEVICE_NO_SLOTS,
                    pinned_bytes=self._pinned_bytes,
                    library=None if library is None else os.fsencode(library),
                )
                failure = DeviceFailure()
                number = int(self._library.el_device_add(self._handle, config, failure))
                if number == E_DEVICE:
                    raise setup_error(device, failure)
                if number < 0:
                    raise call_error(number)
                self._devices[device] = number
                if slots:
                    self._with_slots.add(device)
            return number

    def _add_usrbio(self, access: UsrbioAccess) -> int:
        """The number by which the library knows how to read these files."""
        config = UsrbioConfig(
            struct_bytes=ctypes.sizeof(UsrbioConfig),
            rings=access.rings or min(self.threads, _MOST_RINGS),
            depth=access.depth,
            deadline_ms=max(1, min(round(access.deadline_s * 1e3), 0xFFFFFFFF)),
            io_bytes=access.io_bytes,
            library=os.fsencode(access.library),
            mount=os.fsencode(access.mount),
            slot_io_bytes=access.slot_io_bytes,
            batch=-access.io_depth,
        )
        number = int(self._quick.el_usrbio_add(self._handle, config))
        if number < 0:
            raise call_error(number)
        return number

    def _stats(self) -> Stats:
        stats = Stats()
        if self._closed or self._quick.el_stats(self._handle, stats) != OK:
            return self._last_statistics
        return stats
