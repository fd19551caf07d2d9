"""Loads and saves a training's checkpoint by ``dcp.load`` and ``dcp.save``: by this package's classes and by torch's.

    python -m benchmarks.dcp

The limit of loading is two threads of ``preadv`` into the same tensors. Rounds are interleaved, memory was touched
before, the files lie in the page cache; every way is checked once, bit for bit, into poisoned memory. Saving is
measured without forcing the files to disk, and they are deleted at once.
"""

import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed.checkpoint as torch_dcp

from engine_loader import dcp, open_checkpoint
from engine_loader.bench.page_cache import warm
from engine_loader.bench.plain_reads import read_plainly
from engine_loader.bench.workload import Workload
from engine_loader.dcp import SerializationFormat
from engine_loader.formats.safetensors import TensorInfo
from engine_loader.machine import cpu_model, mount_of, usable_cpus

from .arguments import parser_of
from .checkpoints import GIB

TENSORS = 199
WIDTH = 2048
Tensors = dict[str, torch.Tensor]
_T = TypeVar("_T")


def make_tensors(nbytes: int) -> Tensors:
    """bf16 tensors, as those of a Llama: some large, most of them middling."""
    torch.manual_seed(0)
    weights = [8 if number % 10 == 0 else 1 + number % 3 for number in range(TENSORS)]
    rows = [max(1, nbytes * weight // sum(weights) // (2 * WIDTH)) for weight in weights]
    noise = torch.randn(max(rows), WIDTH).bfloat16()
    return {f"model.layers.{number}.weight": noise[:count] + number for number, count in enumerate(rows)}


def plain_workload(path: Path) -> Workload:
    """Where the bytes of the tensors lie, for plain reads."""
    with open_checkpoint(path) as checkpoint:
        infos: list[TensorInfo] = [checkpoint.info(name) for name in checkpoint]
    infos.sort(key=lambda info: (info.file, info.offset))
    return Workload(path, tuple(dict.fromkeys(info.file for info in infos)), tuple(infos))


def loads(reader: type[torch_dcp.FileSystemReader], path: Path) -> Callable[[Tensors], object]:
    return lambda targets: torch_dcp.load(targets, storage_reader=reader(path), no_dist=True)


def measure(
    ways: dict[str, Callable[[Tensors], object]], tensors: Tensors, rounds: int, *, against: Sequence[str], ratio: str
) -> None:
    """Check each way, then print a table, with the ratio to the fastest of ``against`` under ``ratio``."""
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    for name, load in ways.items():
        for target in targets.values():
            target.fill_(-1)
        load(targets)
        if not all(torch.equal(targets[key], tensor) for key, tensor in tensors.items()):
            raise SystemExit(f"{name} loaded wrong bytes")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in rotated(ways, number):
            began, used = time.perf_counter(), time.process_time()
            ways[name](targets)
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - used)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    limit = min(statistics.median(seconds[name]) for name in against)
    print(f"| loads by | GiB/s, median | slowest - fastest | {ratio} | CPU-seconds |\n|---|---:|---:|---:|---:|")
    for name, times in seconds.items():
        median, rates = statistics.median(times), [nbytes / taken / GIB for taken in times]
        print(
            f"| {name} | {nbytes / median / GIB:.2f} | {min(rates):.2f} - {max(rates):.2f} "
            f"| {limit / median:.2f} | {statistics.median(cpu[name]):.2f} |"
        )
    print()


def rotated(ways: Iterable[_T], number: int) -> list[_T]:
    """The ways in the order of a round: each begins with another one."""
    order = list(ways)
    begin = number % len(order)
    return order[begin:] + order[:begin]


def measure_saves(tensors: Tensors, directory: Path, rounds: int, files: int) -> None:
    """Print a table of saves by torch's writer and this package's, with the memory that each takes meanwhile."""
    writers: dict[str, type[torch_dcp.FileSystemWriter]] = {"torch": torch_dcp.FileSystemWriter}
    writers["engine_loader.dcp"] = dcp.FileSystemWriter
    ways = list(product(SerializationFormat, writers))
    seconds: dict[tuple[SerializationFormat, str], list[float]] = {way: [] for way in ways}
    peaks: dict[tuple[SerializationFormat, str], int] = dict.fromkeys(ways, 0)
    for number in range(rounds + 1):
        for way in rotated(ways, number):
            serialization_format, name = way
            shutil.rmtree(directory, ignore_errors=True)
            writer = writers[name](
                directory, serialization_format=serialization_format, thread_count=files, sync_files=False
            )
            before = resident_bytes(peak=False)
            began = time.perf_counter()
            torch_dcp.save(tensors, storage_writer=writer, no_dist=True)
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - began)
            peaks[way] = max(peaks[way], resident_bytes(peak=True) - before)
    shutil.rmtree(directory, ignore_errors=True)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    print("| saves by | GiB/s, median | slowest - fastest | of torch's | peak memory, MiB |\n|---|---:|---:|---:|---:|")
    for serialization_format, name in ways:
        times = seconds[serialization_format, name]
        rates = [nbytes / taken / GIB for taken in times]
        ratio = statistics.median(seconds[serialization_format, "torch"]) / statistics.median(times)
        print(
            f"| {name}, {serialization_format.value} | {statistics.median(rates):.2f} "
            f"| {min(rates):.2f} - {max(rates):.2f} | {ratio:.2f} | {peaks[serialization_format, name] >> 20} |"
        )
    print()


def resident_bytes(*, peak: bool) -> int:
    """This process's memory, or the most that it had since it was asked for its memory."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(name))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gib", type=float, default=2.27, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--files", type=int, nargs="+", default=[1, 4], help="to measure with (default: 1 4)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is")
    tensors = make_tensors(int(arguments.gib * GIB))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{cpu_model()}, {usable_cpus()} CPUs, Linux {platform.release()}, torch {torch.__version__}")
    for files, serialization_format in product(arguments.files, SerializationFormat):
        path = arguments.dir / f"dcp-{serialization_format.value}-{nbytes}-{files}"
        if not (path / ".metadata").exists():
            writer = dcp.FileSystemWriter(path, serialization_format=serialization_format, thread_count=files)
            torch_dcp.save(tensors, storage_writer=writer, no_dist=True)
        workload = plain_workload(path)
        warm(workload.files)
        mount = mount_of(workload.files[0])
        what = f"{serialization_format.value}, {len(workload.files)} file{'s' if files > 1 else ''}"
        where = f"{mount.kind if mount else 'unknown file system'}, load average {os.getloadavg()[0]:.2f}"
        print(f"\n### {what}: {nbytes / GIB:.2f} GiB in {len(tensors)} tensors ({where})\n")
        ways: dict[str, Callable[[Tensors], object]] = {
            "two threads of preadv": lambda targets, plain=workload: read_plainly(plain, targets, 2),  # type: ignore[misc]
            "engine_loader.dcp.FileSystemReader": loads(dcp.FileSystemReader, path),
            "engine_loader.open_checkpoint": lambda targets, path=path: open_into(path, targets),  # type: ignore[misc]
        }
        if serialization_format == SerializationFormat.TORCH_SAVE:  # torch's reader reads no safetensors
            ways["torch's FileSystemReader"] = loads(torch_dcp.FileSystemReader, path)
        measure(ways, tensors, arguments.rounds, against=["two threads of preadv"], ratio="of the limit")
    saved = dict(list(tensors.items())[: len(tensors) // 3])
    saved_gib = sum(tensor.nbytes for tensor in saved.values()) / GIB
    for files in arguments.files:
        print(f"\n### saved to {files} file{'s' if files > 1 else ''}: {saved_gib:.2f} GiB in {len(saved)} tensors\n")
        measure_saves(saved, arguments.dir / "dcp-saved", arguments.rounds, files)


def open_into(path: Path, targets: Tensors) -> None:
    with open_checkpoint(path) as checkpoint:
        checkpoint.load_into(targets)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
