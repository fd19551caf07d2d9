"""The reader of files on 3FS."""

from __future__ import annotations

import logging
import mmap
import os
from functools import cached_property
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ...sources.posix import PosixSource
from ...sources.source import Source
from ...sources.threefs.discovery import find_client
from ...sources.threefs.shared_library import ThreeFsError
from ...sources.threefs.threefs_source import ThreeFsOptions, ThreeFsSource
from ..address_reader import AddressReader
from .backends import forced_backend, get_backend, settings_for
from .interface import FileReaderInterface

logger = logging.getLogger(__name__)

_RINGS = 2
_LARGEST_IO_BYTES, _SMALLEST_IO_BYTES = 4 << 20, 256 << 10
_IN_FLIGHT = 16


class ThreeFSFileReader(AddressReader, FileReaderInterface):
    """Reads files on 3FS by USRBIO, and all others through the kernel.

    Without 3FS on this machine, and with FASTSAFETENSORS_BACKEND=mock, all files are read through the kernel, so that
    programs run on a laptop; a warning says so, unless the variable does.

    Args:
        mount_point: the mount that the files are on.
        entries: at most half as many reads are in flight on one ring.
        io_depth: accepted, at most ``entries``; it changes nothing, since the rings complete reads one by one.
        buffer_size: bytes of shared memory for reads in flight, and of ``iov_base``.
        backend: "cpp" (native threads), "python", or "auto": what FASTSAFETENSORS_BACKEND says, else the first that
            is available.
        unused: what other versions of the package take, as ``mount_name`` and ``token``; passed over.

    Raises:
        CheckpointError: ``backend`` or the variable names one that is not available, or ``mount_point`` is no
            directory.
        ValueError: ``entries`` is below 2 or ``io_depth`` above ``entries``.
    """

    def __init__(
        self,
        mount_point: str,
        entries: int = 64,
        io_depth: int = 0,
        buffer_size: int = 64 << 20,
        *,
        backend: str = "auto",
        **unused: Any,
    ) -> None:
        if entries < 2 or io_depth > entries:
            raise ValueError(f"entries must be at least 2 and io_depth at most entries, not {entries} and {io_depth}")
        if unused:
            logger.debug("passed over: %s", ", ".join(unused))
        if backend == "auto":
            backend = get_backend()
            if backend == "mock" and forced_backend() is None:
                logger.warning("3FS is not available, so ordinary reads stand in for it (backend mock)")
        settings = settings_for("auto" if backend == "mock" else backend)
        source: Source = PosixSource()
        if backend != "mock":
            _check_there(settings.hf3fs_lib_dir, mount_point)
            source = ThreeFsSource(_fit(ThreeFsOptions.from_settings(settings), entries, buffer_size), fallback=True)
        super().__init__(source, settings)
        self.mount_point = mount_point
        self.iov_length = buffer_size

    @cached_property
    def iov_base(self) -> int:
        """Address of ``iov_length`` bytes of host memory, to read into; it lasts as long as the reader."""
        return int(self._iov.ctypes.data)

    @cached_property
    def _iov(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(mmap.mmap(-1, self.iov_length), np.uint8)


def _check_there(lib_dir: str | None, mount_point: str) -> None:
    try:
        find_client(lib_dir)
    except ThreeFsError as error:
        raise CheckpointError(f"3FS is not available: {error}", hint="set HF3FS_LIB_DIR, or backend mock") from None
    if not os.path.isdir(mount_point):
        raise CheckpointError("there is no such directory", file=mount_point, hint="where is 3FS mounted?")


def _fit(options: ThreeFsOptions, entries: int, buffer_size: int) -> ThreeFsOptions:
    """Options whose reads in flight fit into ``buffer_size``: as large as leaves at least _IN_FLIGHT of them a ring."""
    io_bytes = _LARGEST_IO_BYTES
    while io_bytes > _SMALLEST_IO_BYTES and _RINGS * _IN_FLIGHT * io_bytes * 5 // 4 > buffer_size:
        io_bytes //= 2
    depth = max(1, min(entries // 2, buffer_size * 4 // 5 // io_bytes // _RINGS))
    return ThreeFsOptions(_RINGS, depth, io_bytes, options.deadline_s, options.lib_dir)
