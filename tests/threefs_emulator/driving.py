"""What the emulator's tests read by: registered descriptors, buffers that the client made, and rings."""

import ctypes
import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from engine_loader.sources.threefs.rings import Ioring, Iovec
from tests.support.threefs import Emulator
from tests.support.waiting import GENEROUS_S

KIB = 1 << 10
SOON = timedelta(seconds=GENEROUS_S)  # for what comes
A_MOMENT = timedelta(milliseconds=100)  # for what does not
ContentFile = tuple[Path, bytes]


@contextmanager
def opened(emulator: Emulator, path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    emulator.loaded.register(fd)
    try:
        yield fd
    finally:
        emulator.loaded.deregister(fd)
        os.close(fd)


@contextmanager
def buffer(emulator: Emulator, nbytes: int, block_size: int = 0, *, linked: bool = True) -> Iterator[Iovec]:
    """Shared memory that the client made itself."""
    name = f"el-test-{uuid.uuid4()}"
    fd = os.open(f"/dev/shm/{name}", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, nbytes)
    memory = mmap.mmap(fd, nbytes)
    os.close(fd)
    identity = str(uuid.uuid4())
    suffix = f".b{block_size}" if block_size else ""
    link = emulator.mount / "3fs-virt" / "iovs" / f"{identity}{suffix}"
    if linked:
        link.symlink_to(f"/dev/shm/{name}")
    try:
        yield Iovec(emulator.loaded, memory, identity, str(emulator.mount), block_size)
    finally:
        link.unlink(missing_ok=True)
        os.unlink(f"/dev/shm/{name}")


def ring(emulator: Emulator, entries: int = 16, io_depth: int = -1, flags: int = 0) -> Ioring:
    return Ioring(emulator.loaded, str(emulator.mount), entries, True, io_depth, flags)


def content_of(iov: Iovec) -> bytes:
    return ctypes.string_at(iov.address, max(0, iov.result))


def read(emulator: Emulator, path: Path, offset: int = 0, nbytes: int = 64 * KIB, flags: int = 0) -> tuple[int, bytes]:
    with opened(emulator, path) as fd, buffer(emulator, nbytes) as memory:
        one = ring(emulator, flags=flags)
        (done,) = one.prepare(memory[:], True, fd, offset).submit().wait(min_results=1, timeout=SOON)
        one.destroy()
        return done.result, content_of(done)
