"""Plain reads, which are the limit: the kernel copies the bytes directly into the parameters, or plain requests do."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..failures import end_of_file
from ..sources.source import SourceFile
from .workload import Workload

# Large enough that the time of Python code is negligible, small enough that the threads end at about one time.
_READ_BYTES = 8 << 20
_MOST_BUFFERS = 1000
_DD_BLOCK = "16M"


@dataclass
class _Read:
    path: str
    offset: int
    buffers: list[memoryview] = field(default_factory=list)
    nbytes: int = 0


def read_plainly(workload: Workload, targets: Mapping[str, torch.Tensor], threads: int) -> None:
    """Fill the targets by ``preadv``, or by requests to an object store, on this many threads, each taking the next
    8 MiB of the files.
    """
    reads = deque(_reads(workload, targets))
    files = workload.open_files()
    failures: list[BaseException] = []
    workers = [threading.Thread(target=_work, args=(reads, files, failures), daemon=True) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        # Also on Ctrl-C: no thread may write into memory that is freed, or read from a closed descriptor.
        reads.clear()
        for worker in workers:
            worker.join()
        for file in files.values():
            file.close()
    if failures:
        raise failures[0]


def read_with_dd(workload: Workload) -> None:
    """Read every file by ``dd iflag=direct`` and discard the bytes: the speed of the disk for one reader."""
    for path in workload.files:
        command = ["dd", f"if={path}", "of=/dev/null", f"bs={_DD_BLOCK}", "iflag=direct", "status=none"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise OSError(f"dd: {done.stderr.strip()}")


def _work(reads: deque[_Read], files: Mapping[str, SourceFile], failures: list[BaseException]) -> None:
    try:
        while True:
            try:
                read = reads.popleft()
            except IndexError:
                return
            _fill(files[read.path], read)
    except BaseException as error:
        failures.append(error)
        reads.clear()


def _fill(file: SourceFile, read: _Read) -> None:
    buffers, offset = read.buffers, read.offset
    while buffers:
        got = file.read_into(offset, buffers)
        if not got:
            raise end_of_file(read.path, offset, file.size)
        offset += got
        while buffers and got >= len(buffers[0]):
            got -= len(buffers.pop(0))
        if got:
            buffers[0] = buffers[0][got:]


def _reads(workload: Workload, targets: Mapping[str, torch.Tensor]) -> list[_Read]:
    """Runs of neighbouring tensors, cut into reads of 8 MiB."""
    reads: list[_Read] = []
    for info in workload.tensors:
        if not info.nbytes:
            continue
        memory = memoryview((ctypes.c_char * info.nbytes).from_address(targets[info.name].data_ptr())).cast("B")
        done = 0
        while done < info.nbytes:
            last = reads[-1] if reads else None
            if (
                last is None
                or last.path != info.file
                or last.offset + last.nbytes != info.offset + done
                or last.nbytes >= _READ_BYTES
                or len(last.buffers) >= _MOST_BUFFERS
            ):
                last = _Read(info.file, info.offset + done)
                reads.append(last)
            piece = min(info.nbytes - done, _READ_BYTES - last.nbytes)
            last.buffers.append(memory[done : done + piece])
            last.nbytes += piece
            done += piece
    return reads
