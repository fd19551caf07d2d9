"""A file system whose every read takes its time: the files of one directory, read-only, by FUSE, for root.

    with mounted(directory, place, latency_s=0.01): ...

Speaks the kernel's protocol (include/uapi/linux/fuse.h) over /dev/fuse, since no library for it may be there. Requests
are served by threads, so that those that come together wait together; the kernel sends reads of up to 1 MiB.
"""

import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 18, 25, 26
OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 27, 28, 29, 36, 38, 42
UNANSWERED = (FORGET, BATCH_FORGET, INTERRUPT)
_ASYNC_READ, _MAX_PAGES = 1, 1 << 22
_READ_ONLY, _DETACH = 1, 2
_BUFFER_BYTES = 1 << 21
_VALID_S = 3600
_THREADS = 16
_libc = ctypes.CDLL(None, use_errno=True)


class SlowFiles:
    """Answers for the files of a directory.

    Args:
        directory: whose files are shown; folders are not.
        latency_s: that each read takes, however many there are at once.
    """

    def __init__(self, directory: Path, latency_s: float) -> None:
        self._names = sorted(path.name for path in directory.iterdir() if path.is_file())
        self._files = [os.open(directory / name, os.O_RDONLY) for name in self._names]
        self._facts = directory.stat()
        self._latency_s = latency_s
        self._answers: dict[int, Callable[[int, bytes], bytes]] = {
            INIT: self._init,
            LOOKUP: self._lookup,
            GETATTR: lambda node, _: struct.pack("<QII", _VALID_S, 0, 0) + self._attributes(node),
            OPEN: lambda *_: struct.pack("<QII", 0, 2, 0),  # what is in the page cache stays there
            OPENDIR: lambda *_: struct.pack("<QII", 0, 0, 0),
            READ: self._read,
            READDIR: self._list,
            **dict.fromkeys((RELEASE, RELEASEDIR, FLUSH, DESTROY), lambda *_: b""),
        }

    def answer(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        """An errno, or 0, and what follows the header."""
        found = self._answers.get(opcode)
        if found is None:
            return errno.ENOSYS, b""
        try:
            return 0, found(node, body)
        except OSError as error:
            return error.errno or errno.EIO, b""

    def _init(self, node: int, body: bytes) -> bytes:
        _, _, readahead, flags = struct.unpack_from("<IIII", body)
        flags &= _ASYNC_READ | _MAX_PAGES
        sizes = struct.pack("<HHIIHHI", 64, 48, 1 << 20, 1, 256, 0, 0)
        return struct.pack("<IIII", 7, 31, readahead, flags) + sizes + bytes(28)

    def _lookup(self, node: int, body: bytes) -> bytes:
        name = os.fsdecode(body.rstrip(b"\0"))
        if name not in self._names:
            raise FileNotFoundError(errno.ENOENT, name)
        found = self._names.index(name) + 2
        return struct.pack("<QQQQII", found, 0, _VALID_S, _VALID_S, 0, 0) + self._attributes(found)

    def _attributes(self, node: int) -> bytes:
        facts = self._facts if node == 1 else os.fstat(self._files[node - 2])
        size = 0 if node == 1 else facts.st_size
        mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o644
        times = [int(facts.st_mtime)] * 3
        return struct.pack(
            "<QQQQQQIIIIIIIIII", node, size, -(-size // 512), *times, *[0] * 3, mode, 1, 0, 0, 0, 4096, 0
        )

    def _read(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        time.sleep(self._latency_s)
        return os.pread(self._files[node - 2], size, offset)

    def _list(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        found = b""
        for number, name in list(enumerate(self._names))[offset:]:
            raw = os.fsencode(name)
            entry = struct.pack("<QQII", number + 2, number + 1, len(raw), stat.S_IFREG >> 12) + raw
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


@contextmanager
def mounted(directory: Path, place: Path, *, latency_s: float) -> Iterator[Path]:
    """While the block runs, the files of ``directory`` are at ``place``, too, and slow."""
    command = [sys.executable, "-m", "benchmarks.slow_fuse", str(directory), str(place), str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            if not server.stdout.readline():
                raise RuntimeError("nothing was mounted")
            yield place
        finally:
            _libc.umount2(os.fsencode(place), _DETACH)
            server.send_signal(signal.SIGTERM)


def serve(device: int, files: SlowFiles) -> None:
    """Answer until the file system is unmounted."""
    while True:
        try:
            request = os.read(device, _BUFFER_BYTES)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                continue
            return
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode in UNANSWERED:
            continue
        failed, payload = files.answer(opcode, node, request[40:])
        with suppress(OSError):  # it was interrupted meanwhile
            os.write(device, struct.pack("<IiQ", 16 + len(payload), -failed, unique) + payload)


def main() -> int:
    directory, place, latency_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if _libc.mount(b"slow", os.fsencode(place), b"fuse.slow", _READ_ONLY, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), place)
    files = SlowFiles(directory, latency_s)
    threads = [threading.Thread(target=serve, args=(device, files), daemon=True) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    print("mounted", flush=True)
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
