"""Files on 3FS, read by USRBIO: past the kernel, from the storage into shared memory.

Each file is asked for by 3FS's own test, never by its name. Here is what opens and registers files; the reading is the
native reader threads' (transfer/native/src/readers/reader_usrbio.cpp), or ``Channel``'s for pure-Python reader threads.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from ...errors import CheckpointError
from ..posix import PosixFile, PosixSource
from ..source import SourceFile
from .channel import ChannelPool
from .library import (
    BINDING,
    Hf3fsError,
    Hf3fsLibrary,
    check_mount,
    find_library,
    is_hf3fs_by_ioctl,
    load_library,
    mounts,
    register_hint,
)
from .rings import Rings

logger = logging.getLogger(__name__)

_SMALL_BYTES = 256 << 10
"""Reads up to this size (headers, an index) go through the mount: a ring would cost more than it saves."""


@dataclass(frozen=True)
class UsrbioOptions:
    """How files on 3FS are read.

    Attributes:
        rings: reading threads, each with a ring of its own; None: as many as the reader threads find best.
        depth: IOs in flight on each ring.
        io_bytes: the largest IO; it is fitted to the file's chunk size.
        deadline_s: an IO without a byte for so long has failed. 3FS itself tries for 60 s.
        lib_dir: where the library is; None: see hf3fs.py.
    """

    rings: int | None = None
    depth: int = 16
    io_bytes: int = 4 << 20
    deadline_s: float = 90.0
    lib_dir: str | None = None


class Client(Protocol):
    """What speaks to 3FS in this process: the library, or the binding where only that is there.

    Attributes:
        library: the library's path for native reader threads, or None.
        binding: what has the binding's interface.
        name: for a person.
    """

    library: str | None
    binding: Any
    name: str

    def mount_of(self, path: str, fd: int) -> str | None:
        """The mount, if the open file is on 3FS."""
        ...


class LibraryClient:
    """3FS by its library."""

    def __init__(self, library: Hf3fsLibrary) -> None:
        self.library: str | None = os.fspath(library.path)
        self.binding: Any = Rings(library)
        self.name = self.library
        self._calls = library

    def mount_of(self, path: str, fd: int) -> str | None:
        return self._calls.mount_point(path) if self._calls.is_hf3fs(fd) else None


class BindingClient:
    """3FS by the binding hf3fs_py_usrbio."""

    def __init__(self) -> None:
        self.library: str | None = None
        self.binding: Any = import_module(BINDING)
        self.name = BINDING

    def mount_of(self, path: str, fd: int) -> str | None:
        mount: str | None = self.binding.extract_mount_point(path)
        return mount if mount and (is_hf3fs_by_ioctl(fd) or self._registers(fd)) else None

    def _registers(self, fd: int) -> bool:
        try:
            self.binding.register_fd(fd)
        except OSError:
            return False
        self.binding.deregister_fd(fd)
        return True


def find_client(lib_dir: str | None = None) -> Client:
    """What this process can speak to 3FS by: the library, else the binding.

    Raises:
        Hf3fsError: neither is there; the message names each place that was tried.
    """
    search = find_library(lib_dir)
    problem = search.explain()
    if search.path is not None:
        try:
            return LibraryClient(load_library(search.path))
        except Hf3fsError as error:
            problem = str(error)
    try:
        return BindingClient()
    except ImportError as error:
        raise Hf3fsError(f"{problem}; {BINDING}: {error}") from None


def is_available(path: str | None = None, lib_dir: str | None = None) -> bool:
    """Whether a read by USRBIO would work: the library loads, and 3FS is mounted with all that a read needs.

    Args:
        path: a file or directory that is meant to be on 3FS; None: any mount will do.
        lib_dir: where the library is.
    """
    return why_not(path, lib_dir) is None


def why_not(path: str | None = None, lib_dir: str | None = None) -> str | None:
    """What stands between this process and a read by USRBIO; None when nothing does. Arguments as ``is_available``."""
    try:
        client = find_client(lib_dir)
    except Hf3fsError as error:
        return str(error)
    places = [path] if path is not None else mounts_here()
    if not places:
        return "no 3FS is mounted on this machine"
    problems = [_problem(client, place) for place in places]
    return None if None in problems else problems[0]


def mounts_here() -> list[str]:
    """The 3FS mounts of this machine, that of an emulator included, which is not in the mount table."""
    return [*mounts(), *filter(None, [os.environ.get("HF3FS_EMULATOR_MOUNT")])]


def _problem(client: Client, path: str) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return f"{path}: {error.strerror}"
    try:
        mount = client.mount_of(path, fd)
    finally:
        os.close(fd)
    return f"{path} is not on 3FS" if mount is None else check_mount(mount)


class UsrbioFile:
    """An open file on 3FS, registered until it is closed.

    Attributes:
        mount: the 3FS mount that it is on.
        library: the library's path, or None where only the Python binding is there.
        options: how it is read.
    """

    source = "usrbio"

    def __init__(
        self, opened: PosixFile, mount: str, client: Client, options: UsrbioOptions, pool: ChannelPool
    ) -> None:
        self.path, self.size = opened.path, opened.size
        self.mount = mount
        self.library = client.library
        self.options = options
        self._opened = opened
        self._binding = client.binding
        self._pool = pool
        self._closed = True
        self._closing = threading.Lock()
        try:
            client.binding.register_fd(opened.fileno())
        except OSError as error:
            hint = register_hint(error.errno)
            raise CheckpointError(f"3FS does not take the open file: {error}", file=self.path, hint=hint) from None
        self._closed = False
        pool.open()

    @property
    def io_bytes(self) -> int:
        """The size of IOs for this file: so that none crosses from one chunk into the next without need."""
        return fit_io_bytes(self.options.io_bytes, os.fstat(self._opened.fileno()).st_blksize)

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        if sum(map(len, buffers)) <= _SMALL_BYTES:
            return self._opened.read_into(offset, buffers)
        done = self._pool.read(self.path, self._opened.fileno(), offset, buffers, self.options.deadline_s)
        # Empty before the end of the file: a hole, or 3FS failed. The kernel's way tells which.
        return done or self._opened.read_into(offset, buffers)

    def fileno(self) -> int | None:
        return None if self.library is None else self._opened.fileno()

    def verify_unchanged(self) -> None:
        self._opened.verify_unchanged()

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._binding.deregister_fd(self._opened.fileno())
            self._opened.close()
        self._pool.close()

    def __del__(self) -> None:
        self.close()


class UsrbioSource:
    """Files on 3FS; the rest of what a source does is the mount's.

    Args:
        options: how files are read.
        fallback: open files that are not on 3FS as ordinary ones, and say so; otherwise they are an error.

    Raises:
        CheckpointError: there is no library, and ``fallback`` is off.
    """

    def __init__(self, options: UsrbioOptions | None = None, *, fallback: bool = False) -> None:
        self.name = "posix" if fallback else "usrbio"
        self.options = options or UsrbioOptions()
        self._mounted = PosixSource()
        self._fallback = fallback
        self._pools: dict[str, ChannelPool] = {}
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._missing = ""
        self._said: set[str] = set()
        try:
            self._client = find_client(self.options.lib_dir)
        except Hf3fsError as error:
            self._missing = str(error)
            if not fallback:
                raise CheckpointError(
                    f"backend usrbio cannot be had: {error}", hint="set HF3FS_LIB_DIR, or backend: auto"
                ) from None

    def open(self, path: str) -> SourceFile:
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

    def _on_3fs(self, opened: PosixFile) -> UsrbioFile | None:
        fd = opened.fileno()
        if self._client is None:
            if is_hf3fs_by_ioctl(fd):
                self._fall_back(opened.path, self._missing)
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
        file = UsrbioFile(opened, mount, self._client, self.options, self._pool(mount))
        self.name = "usrbio"
        self._say(logging.INFO, mount, f"files on the 3FS mount {mount} are read by USRBIO ({self._client.name})")
        return file

    def _pool(self, mount: str) -> ChannelPool:
        with self._lock:
            if mount not in self._pools:
                assert self._client is not None
                depth, io_bytes = self.options.depth, self.options.io_bytes
                # A Python reader thread reads a block at a time; its IOs are that cut in four.
                buffer_bytes = max(2 * io_bytes, io_bytes * depth // 8)
                self._pools[mount] = ChannelPool(self._client.binding, mount, buffer_bytes, io_bytes // 2)
            return self._pools[mount]

    def _fall_back(self, path: str, why: str) -> None:
        self.name = f"posix, through the mount of 3FS as {why}"
        self._say(logging.WARNING, why, f"{path} is on 3FS, but is read through its mount: {why}")

    def _say(self, level: int, subject: str, message: str) -> None:
        """Say it once, not once per file."""
        with self._lock:
            if subject in self._said:
                return
            self._said.add(subject)
        logger.log(level, "%s", message)


def fit_io_bytes(wanted: int, chunk: int) -> int:
    """The IO size nearest below ``wanted`` at which cuts fall on chunk boundaries; a huge chunk is cut evenly."""
    if chunk <= 4096:  # the page size says nothing about chunks
        return wanted
    if chunk <= wanted:
        return wanted // chunk * chunk
    parts = -(-chunk // wanted)
    while chunk % parts or chunk // parts % 4096:
        parts += 1
        if parts > 4096:
            return wanted
    return chunk // parts
