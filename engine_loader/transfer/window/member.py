"""A rank in the window: it joins, submits plans, reads blocks for all where native threads cannot, and leaves."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import CheckpointError, TransferError
from ...sources.source import SourceFile
from ..device_stream import DeviceStream
from ..native.library import OK, TIMEOUT, File
from ..native.native_readers import NativeReaders
from ..native.transfer import SLICE_MS
from ..plan import EXTENT, Extents, extent, make_extents
from ..protocol import ReaderThreads
from .window_library import (
    SharedFile,
    SharedRegion,
    WindowConfig,
    WindowRead,
    WindowStats,
    load_quick_window,
    load_window,
)

SLOT_BYTES = 4 << 20
_MOST_AHEAD = 64 << 20
"""What the ranks of a machine read into the window at once is of the order of this, each a part."""
_MOST_REQUESTS = 64
"""So many blocks the ranks of a machine ask an object store for at once."""
_LEAST_AHEAD = 4
_SHARE_AHEAD = 32
"""Together they ask for this part of all files at most: requests that share a link end together, and with the last ones
nothing is left to come while every rank copies them."""
_JOIN_S = 1.0


class Region(NamedTuple):
    """Bytes of a file of which several ranks will want all or a part: a tensor.

    Attributes:
        file: its number in the plan.
        offset: of its first byte in the file.
        nbytes: how many.
        expected: so many ranks want each of its bytes.
        most: so many want any of them.
    """

    file: int
    offset: int
    nbytes: int
    expected: int
    most: int


class WindowMember:
    """One rank, from joining to ``leave``.

    Args:
        directory: where the ranks meet.
        nbytes: of a window that is made because there is none.
        timeout_s: how long to wait for another rank.
        ranks: that read at the same time.
        readers: read blocks. Python ones read nothing else: what they were given before would keep other ranks waiting.
        copies: native threads that copy from the window.
        files: that will be read; blocks that this rank has no use for need not wait for it.

    Raises:
        TransferError: the window cannot be joined.
    """

    def __init__(
        self,
        directory: Path,
        nbytes: int,
        *,
        timeout_s: float,
        ranks: int,
        readers: ReaderThreads,
        copies: NativeReaders,
        files: Sequence[SourceFile],
    ) -> None:
        self._handle: ctypes.c_void_p | None = None
        self._library, self._quick = load_window(), load_quick_window()
        self._readers, self._copies = readers, copies
        self._files: list[SourceFile] = []
        self._numbers: dict[int, int] = {}
        self._keys: dict[int, tuple[int, int] | None] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._last = WindowStats()
        self._threads: list[threading.Thread] = []
        native = isinstance(readers, NativeReaders)
        if native:
            ahead = max(_LEAST_AHEAD, _MOST_AHEAD // SLOT_BYTES // ranks)
        else:
            blocks = min(_MOST_REQUESTS, sum(file.size for file in files) // SLOT_BYTES // _SHARE_AHEAD)
            ahead = min(readers.threads, max(_LEAST_AHEAD, blocks // ranks))
        keys = np.array([key for key in map(self._key, files) if key is not None], np.uint64)
        config = WindowConfig(
            struct_bytes=ctypes.sizeof(WindowConfig),
            ahead=ahead,
            timeout_ms=max(1, round(timeout_s * 1e3)),
            bytes=nbytes,
            slot_bytes=SLOT_BYTES,
            directory=os.fsencode(directory),
            reads=readers.handle if isinstance(readers, NativeReaders) else None,
            copies=copies.handle,
            keys=keys.ctypes.data,
            n_keys=len(keys),
        )
        handle = ctypes.c_void_p()
        result = self._library.el_window_join(config, handle)
        if result != OK:
            text = os.strerror(result) if result > 0 else f"the library said {result}"
            raise TransferError(f"this machine's ranks cannot share what they read: {text}", file=directory)
        self._handle = handle
        if not native:
            self._start_threads(ahead)

    def submit(
        self,
        files: Sequence[SourceFile],
        regions: Sequence[Region],
        extents: Extents,
        region_of: npt.NDArray[np.uint32],
        stream: DeviceStream | None,
    ) -> ctypes.c_void_p | None:
        """Start a plan; returns the library's handle, or None where the window cannot be used any more.

        Args:
            files: worth sharing, each of them.
            regions: of the files.
            extents: the plan.
            region_of: the number of the region in which each extent lies.
            stream: of the device that holds the destinations; None: they are in the CPU's memory.
        """
        if self._handle is None or os.getpid() != self._pid:
            return None
        native_files = (SharedFile * len(files))(*map(self._shared_file, files))
        native_regions = (SharedRegion * len(regions))(*(_native_region(region) for region in regions))
        extents = np.ascontiguousarray(extents, dtype=EXTENT)
        region_of = np.ascontiguousarray(region_of, dtype=np.uint32)
        device = -1 if stream is None else self._copies.add_device(stream.device)
        handle = ctypes.c_void_p()
        result = self._quick.el_shared_submit(
            *(self._handle, native_files, len(files), native_regions, len(regions)),
            *(extents.ctypes.data, region_of.ctypes.data, len(extents), device),
            *(0 if stream is None else stream.stream, handle),
        )
        return handle if result == OK else None

    def statistics(self) -> WindowStats:
        """What was shared so far."""
        if self._handle is not None and os.getpid() == self._pid:
            self._quick.el_window_look(self._handle, self._last)
        return self._last

    def leave(self) -> None:
        """Give up what is under way, and leave. Safe to call twice; before the readers are closed."""
        if self._handle is None or os.getpid() != self._pid:
            return
        self.statistics()
        handle, self._handle = self._handle, None
        self._library.el_window_leave(handle)
        end = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            self._quick.el_window_free(handle)  # else a read that never returns still needs it

    def _shared_file(self, file: SourceFile) -> SharedFile:
        key = self._key(file)
        assert key is not None
        return SharedFile(file=self._native_file(file), key=(ctypes.c_uint64 * 2)(*key))

    def _native_file(self, file: SourceFile) -> File:
        if isinstance(self._readers, NativeReaders):
            return self._readers.native_file(file)
        return File(fd=self._numbers[id(file)], direct_fd=-1, size=file.size)

    def _key(self, file: SourceFile) -> tuple[int, int] | None:
        with self._lock:
            if id(file) not in self._keys:
                identity = file.identity()
                self._keys[id(file)] = None if identity is None else _hash(identity)
                self._numbers[id(file)] = len(self._files)
                self._files.append(file)  # so that no other gets its id
            return self._keys[id(file)]

    def _start_threads(self, count: int) -> None:
        """Threads that have blocks read by the Python reader threads."""
        for _ in range(count):
            thread = threading.Thread(target=self._read_for_all, name="engine-loader-share", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _read_for_all(self) -> None:
        read = WindowRead()
        handle = self._handle
        # By way of memory of its own, used again until a read has failed: one that is given up may write there later.
        memory: npt.NDArray[np.uint8] | None = None
        while (result := self._library.el_window_next_read(handle, SLICE_MS, read)) in (OK, TIMEOUT):
            if result != OK:
                continue
            memory = np.empty(SLOT_BYTES, np.uint8) if memory is None else memory
            complete = self._read_block(read, memory)
            memory = memory if complete else None
            self._library.el_window_answer(handle, read.number, complete)

    def _read_block(self, read: WindowRead, memory: npt.NDArray[np.uint8]) -> bool:
        """Read a block into the window; False where it cannot be read: this rank tries its own part again then."""
        content = memory[: read.bytes]
        rows = make_extents([extent(0, read.offset, read.bytes, content.ctypes.data)])
        try:
            self._readers.submit([self._files[read.file]], rows, owner=content).wait()
        except CheckpointError:
            return False
        slot = (ctypes.c_uint8 * read.bytes).from_address(read.address)
        np.copyto(np.frombuffer(slot, np.uint8), content)
        return True


def is_worth_sharing(readers: ReaderThreads, file: SourceFile) -> bool:
    """Whether it is of use to read a file by way of the window: reads wait for storage, and all ranks know the file."""
    waits = readers.waits_for_storage(file) if isinstance(readers, NativeReaders) else file.remote
    return waits and file.identity() is not None


def _native_region(region: Region) -> SharedRegion:
    return SharedRegion(
        file=region.file, expected=region.expected, offset=region.offset, bytes=region.nbytes, most=region.most
    )


def _hash(identity: str) -> tuple[int, int]:
    digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
