"""Files on 3FS, read by USRBIO: past the kernel, from the storage into shared memory.

3FS itself says whether a file is on it; paths are not looked at. This module opens and registers files. The native
reader threads read them (transfer/native/src/readers/reader_usrbio.cpp), or ``Channel`` for the pure-Python engine.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from ...errors import CheckpointError
from ..posix import PosixFile, PosixSource
from ..source import SourceFile, UsrbioAccess
from .channel import ChannelPool
from .discovery import Client, find_client
from .links import remove_dead
from .read_failures import no_answer, no_data
from .shared_library import ThreeFsError, check_mount, is_threefs_by_ioctl, register_hint
from .watched import NoAnswer, call_within

if TYPE_CHECKING:
    from ...settings import LoaderSettings

logger = logging.getLogger(__name__)

_SMALL_BYTES = 256 << 10
"""Reads up to this size (headers, an index) go through the mount: a ring would cost more than it saves."""

_USUAL_CHUNK_BYTES = 1 << 20
_CLOSE_WAIT_S = 1.0
_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True)
class ThreeFsOptions:
    """How files on 3FS are read.

    Attributes:
        rings: reader threads, each with a ring of its own; None: the transfer engine chooses.
        depth: IOs in flight on each ring.
        io_bytes: the largest IO; it is fitted to the file's chunk size.
        io_depth: minus the IOs that the daemon carries out as one job at most; they complete together.
        deadline_s: an IO without a byte for so many seconds has failed. 3FS itself retries for 60 s.
        lib_dir: the directory of the library; None: searched for, see find_library.
    """

    rings: int | None = None
    depth: int = 16
    io_bytes: int = 4 << 20
    deadline_s: float = 90.0
    lib_dir: str | None = None
    io_depth: int = -1

    @classmethod
    def from_settings(cls, settings: LoaderSettings) -> Self:
        """The options that the settings give."""
        return cls(
            rings=settings.usrbio_rings,
            depth=settings.usrbio_depth,
            io_bytes=int(settings.io_bytes or cls.io_bytes),
            deadline_s=settings.usrbio_deadline_s,
            io_depth=settings.usrbio_io_depth,
            lib_dir=settings.hf3fs_lib_dir,
        )


class ThreeFsFile:
    """An open file on 3FS, registered until it is closed.

    Without the library, where only the Python binding is installed, it has no descriptor for native threads.
    """

    source = "usrbio"
    remote = False
    mappable = False

    def __init__(
        self, opened: PosixFile, mount: str, client: Client, options: ThreeFsOptions, pool: ChannelPool
    ) -> None:
        self.path, self.size = opened.path, opened.size
        self._deadline_s = options.deadline_s
        self._opened = opened
        self._binding = client.binding
        self._pool = pool
        self._closed = True
        self._closing = threading.Lock()
        chunk_bytes = os.fstat(opened.fileno()).st_blksize
        self._piece = chunk_bytes if chunk_bytes > 4096 else _USUAL_CHUNK_BYTES
        self.native_access = _native_access(opened, mount, client, options)
        try:
            client.binding.register_fd(opened.fileno())
        except OSError as error:
            hint = register_hint(error.errno)
            raise CheckpointError(f"3FS does not take the open file: {error}", file=self.path, hint=hint) from None
        self._closed = False
        pool.open()

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        wanted = min(sum(map(len, buffers)), max(0, self.size - offset))
        if wanted <= _SMALL_BYTES:
            return _copy(self._read_through_mount(offset, wanted), buffers)
        done = self._pool.read(self.path, self._opened.fileno(), offset, buffers, self._deadline_s)
        return done or self._read_hole(offset, min(wanted, self._piece - offset % self._piece), buffers)

    def _read_hole(self, offset: int, nbytes: int, buffers: Sequence[memoryview]) -> int:
        """Read what USRBIO has no data for through the mount: up to the end of its chunk.

        The mount reads what is missing as zeros. So USRBIO has to confirm zeros, a part at a time.
        """
        content = self._read_through_mount(offset, nbytes)
        if content.tobytes().strip(b"\0"):
            return _copy(content, buffers)
        again = memoryview(bytearray(min(len(content), _SMALL_BYTES)))
        for _ in range(_TRIES if again else 0):
            done = self._pool.read(self.path, self._opened.fileno(), offset, [again], self._deadline_s)
            if done:
                return _copy(again[:done], buffers)
        if again:
            raise no_data(self.path, offset, len(again))
        return 0

    def _read_through_mount(self, offset: int, nbytes: int) -> memoryview:
        """Into memory of its own, to which a read that never returns may write later."""
        memory = memoryview(bytearray(nbytes))
        done = self._call("a read through the mount", lambda: self._opened.read_into(offset, [memory]))
        return memory[:done]

    def _call(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call_within(self._deadline_s, call)
        except NoAnswer:
            raise no_answer(self.path, what, self._deadline_s) from None

    def fileno(self) -> int | None:
        return None if self.native_access is None else self._opened.fileno()

    def identity(self) -> str | None:
        return self._opened.identity()

    def verify_unchanged(self) -> None:
        self._opened.verify_unchanged()

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(NoAnswer):  # the thread closes it when 3FS answers
                call_within(_CLOSE_WAIT_S, self._close)
        self._pool.close()

    def _close(self) -> None:
        self._binding.deregister_fd(self._opened.fileno())
        self._opened.close()

    def __del__(self) -> None:
        if self._closed:
            return
        self._closed = True
        # Not by call_within: the collector may run while the lock is held that a thread's start takes.
        try:
            _thread.start_new_thread(self._close, ())
        except RuntimeError:  # the interpreter ends
            self._close()
        self._pool.close()


def _native_access(opened: PosixFile, mount: str, client: Client, options: ThreeFsOptions) -> UsrbioAccess | None:
    if client.library is None:
        return None
    chunk_bytes = os.fstat(opened.fileno()).st_blksize
    io_bytes = fit_io_bytes(options.io_bytes, chunk_bytes)
    return UsrbioAccess(
        client.library,
        mount,
        rings=options.rings,
        depth=options.depth,
        io_bytes=io_bytes,
        slot_io_bytes=max(io_bytes, options.io_bytes),
        io_depth=options.io_depth,
        deadline_s=options.deadline_s,
    )


class ThreeFsSource:
    """Files on 3FS. Directories are listed through its mount.

    Args:
        options: how files are read.
        fallback: read files through the kernel where USRBIO is not possible, and log why; otherwise that is an error.

    Raises:
        CheckpointError: neither library nor binding of 3FS was found, and ``fallback`` is off.
    """

    def __init__(self, options: ThreeFsOptions | None = None, *, fallback: bool = False) -> None:
        self.name = "posix" if fallback else "usrbio"
        self.options = options or ThreeFsOptions()
        self._mounted = PosixSource()
        self._fallback = fallback
        self._pools: dict[str, ChannelPool] = {}
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._no_client_because = ""
        self._logged: set[str] = set()
        try:
            self._client = find_client(self.options.lib_dir)
        except ThreeFsError as error:
            self._no_client_because = str(error)
            if not fallback:
                raise CheckpointError(
                    f"backend usrbio is not available: {error}", hint="set HF3FS_LIB_DIR, or backend: auto"
                ) from None

    @classmethod
    def from_settings(cls, settings: LoaderSettings) -> Self:
        """A source of files on 3FS alone; any other file is an error.

        Raises:
            CheckpointError: neither library nor binding of 3FS was found.
        """
        return cls(ThreeFsOptions.from_settings(settings))

    def open(self, path: str) -> SourceFile:
        if self._client is None:
            return self._open(path)
        try:
            return call_within(self.options.deadline_s, lambda: self._open(path), lambda file: file.close())
        except NoAnswer:
            raise no_answer(path, "the file is opened", self.options.deadline_s) from None

    def _open(self, path: str) -> SourceFile:
        opened = self._mounted.open(path)
        try:
            return self._on_3fs(opened) or opened
        except BaseException:
            opened.close()
            raise

    def is_dir(self, path: str) -> bool:
        return self._mounted.is_dir(path)

    def list(self, path: str) -> list[str]:
        return self._mounted.list(path)

    def folders(self, path: str) -> Sequence[str]:
        return self._mounted.folders(path)

    def _on_3fs(self, opened: PosixFile) -> ThreeFsFile | None:
        fd = opened.fileno()
        if self._client is None:
            if is_threefs_by_ioctl(fd):
                self._fall_back(opened.path, self._no_client_because)
            return None
        mount = self._client.mount_of(opened.path, fd)
        problem = f"it is not on 3FS ({self._client.name} says)" if mount is None else check_mount(mount)
        if problem is not None and not self._fallback:
            raise CheckpointError(f"backend usrbio cannot read this file: {problem}", file=opened.path)
        if mount is None:
            return None
        if problem is not None:
            self._fall_back(opened.path, problem)
            return None
        file = ThreeFsFile(opened, mount, self._client, self.options, self._pool(mount))
        self.name = "usrbio"
        self._log_once(logging.INFO, mount, f"files on the 3FS mount {mount} are read by USRBIO ({self._client.name})")
        return file

    def _pool(self, mount: str) -> ChannelPool:
        with self._lock:
            if mount not in self._pools:
                remove_dead()
                assert self._client is not None
                depth, io_bytes = self.options.depth, self.options.io_bytes
                # A thread of the Python engine reads one block at a time, in four IOs.
                buffer_bytes = max(2 * io_bytes, io_bytes * depth // 8)
                self._pools[mount] = ChannelPool(self._client.binding, mount, buffer_bytes, io_bytes // 2)
            return self._pools[mount]

    def _fall_back(self, path: str, why: str) -> None:
        self.name = f"posix, through the mount of 3FS as {why}"
        self._log_once(logging.WARNING, why, f"{path} is on 3FS, but is read through its mount: {why}")

    def _log_once(self, level: int, subject: str, message: str) -> None:
        """Log a message once per subject, not once per file."""
        with self._lock:
            if subject in self._logged:
                return
            self._logged.add(subject)
        logger.log(level, "%s", message)


def _copy(content: memoryview, buffers: Sequence[memoryview]) -> int:
    """Copy into the buffers in turn; returns how many bytes there were."""
    at = 0
    for buffer in buffers:
        part = content[at : at + len(buffer)]
        buffer[: len(part)] = part
        at += len(part)
    return len(content)


def fit_io_bytes(wanted: int, chunk: int) -> int:
    """The IO size nearest below ``wanted`` at which cuts fall on chunk boundaries; a huge chunk is cut evenly."""
    if chunk <= 4096:  # a page, not a chunk
        return wanted
    if chunk <= wanted:
        return wanted // chunk * chunk
    parts = -(-chunk // wanted)
    while chunk % parts or chunk // parts % 4096:
        parts += 1
        if parts > 4096:
            return wanted
    return chunk // parts
