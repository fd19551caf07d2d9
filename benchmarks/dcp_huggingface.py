"""Loads and saves Hugging Face checkpoints by ``dcp.load`` and ``dcp.save``: by this package's storages and by torch's.

    python -m benchmarks.dcp_huggingface

Two checkpoints of the same tensors: the files of a model as on the hub, and the parts that four ranks saved, of rows.
The limit is two threads of ``preadv`` into the same tensors, which know where bytes lie and where they go. Rounds are
interleaved, memory was touched before, the files lie in the page cache; every way is checked once, bit for bit, into
poisoned memory. Saving forces the files to disk, as torch's writer does.
"""

import dataclasses
import json
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file

from engine_loader import dcp
from engine_loader.bench.page_cache import warm
from engine_loader.bench.plain_reads import read_plainly
from engine_loader.bench.workload import Workload
from engine_loader.formats.dcp_parts import saved_offsets
from engine_loader.loading.shards import OpenFiles
from engine_loader.machine import cpu_model, mount_of, usable_cpus
from engine_loader.sources.posix import PosixSource

from .arguments import parser_of
from .checkpoints import GIB
from .dcp import Tensors, make_tensors, resident_bytes, rotated

FILES, RANKS = 6, 4
LIMIT = "two threads of preadv"
READERS = {
    "engine_loader.dcp": dcp.HuggingFaceStorageReader,
    "torch": torch_dcp.HuggingFaceStorageReader,
}
WRITERS = {
    "engine_loader.dcp": dcp.HuggingFaceStorageWriter,
    "torch": torch_dcp.HuggingFaceStorageWriter,
}


def file_of(name: str) -> int:
    """The number of the file that a tensor goes to, from 1."""
    return 1 + int(name.split(".")[2]) % FILES


def hub_files(tensors: Tensors, directory: Path) -> Path:
    """A checkpoint as on the hub."""
    if not directory.exists():
        unfinished = directory.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        writer = dcp.HuggingFaceStorageWriter(unfinished, {name: file_of(name) for name in tensors})
        torch_dcp.save(tensors, storage_writer=writer, no_dist=True)
        unfinished.rename(directory)
    return directory


def parts_of_rows(tensors: Tensors, directory: Path) -> Path:
    """What the ranks of a training save, each its rows."""
    if directory.exists():
        return directory
    unfinished = directory.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for rank in range(RANKS):
        rows, offsets = {}, {}
        for name, tensor in tensors.items():
            begin, end = (len(tensor) * number // RANKS for number in (rank, rank + 1))
            rows[name], offsets[name] = tensor[begin:end].contiguous(), {"saved_offsets": [begin, 0]}
        info = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(rows, unfinished / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors", metadata=info)
    unfinished.rename(directory)
    return directory


def plain_reads(path: Path, targets: Tensors) -> tuple[Workload, Tensors]:
    """Where the bytes lie, and where they go, part by part."""
    with OpenFiles(PosixSource(), sorted(map(str, path.glob("*.safetensors")))) as files:
        headers = files.headers
    infos, into = [], {}
    for header in headers:
        offsets = saved_offsets(header) or {}
        for info in header.tensors:
            begin = offsets[info.name][0]
            name = f"{info.name} at {begin}"
            infos.append(dataclasses.replace(info, name=name))
            into[name] = targets[info.name][begin : begin + info.shape[0]]
    return Workload(path, tuple(header.file for header in headers), tuple(infos)), into


def measure(path: Path, tensors: Tensors, rounds: int, torch_rounds: int) -> None:
    """Print a table of loads of whole tensors."""
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    workload, into = plain_reads(path, targets)
    ways: dict[str, Callable[[], object]] = {LIMIT: lambda: read_plainly(workload, into, 2)}
    for name, reader in READERS.items():
        ways[name] = lambda reader=reader: torch_dcp.load(targets, storage_reader=reader(str(path)), no_dist=True)  # type: ignore[misc]
    print_table(ways, targets, tensors, rounds, torch_rounds)


def print_table(
    ways: dict[str, Callable[[], object]], targets: Tensors, tensors: Tensors, rounds: int, torch_rounds: int
) -> None:
    """Check each way, run them in turns, and print what they took."""
    peaks = dict.fromkeys(ways, 0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, load in ways.items():
        for target in targets.values():
            target.fill_(-1)
        before = resident_bytes(peak=False)
        load()
        peaks[name] = resident_bytes(peak=True) - before
        if not all(torch.equal(targets[key], tensor) for key, tensor in tensors.items()):
            raise SystemExit(f"{name} loaded wrong bytes")
    for number in range(rounds):
        for name in rotated(ways, number):
            if name == "torch" and number >= torch_rounds:
                continue
            began = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - began)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    limit = medians[LIMIT]
    print("| loads by | GiB/s, median | slowest - fastest | of preadv | of torch's | peak memory, MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, times in seconds.items():
        rates = [nbytes / taken / GIB for taken in times]
        print(
            f"| {name} | {nbytes / medians[name] / GIB:.2f} | {min(rates):.2f} - {max(rates):.2f} "
            f"| {limit / medians[name]:.2f} | {medians['torch'] / medians[name]:.1f} | {peaks[name] >> 20} |"
        )
    print(flush=True)


def measure_saves(tensors: Tensors, directory: Path, rounds: int) -> None:
    """Print a table of saves, on tmpfs or a disk as ``directory`` is; both force files to disk, as torch does."""
    seconds: dict[str, list[float]] = {name: [] for name in WRITERS}
    peaks = dict.fromkeys(WRITERS, 0)
    files = {name: file_of(name) for name in tensors}
    for number in range(rounds):
        for name in rotated(WRITERS, number):
            shutil.rmtree(directory, ignore_errors=True)
            before = resident_bytes(peak=False)
            began = time.perf_counter()
            torch_dcp.save(tensors, storage_writer=WRITERS[name](str(directory), files), no_dist=True)
            seconds[name].append(time.perf_counter() - began)
            peaks[name] = max(peaks[name], resident_bytes(peak=True) - before)
    shutil.rmtree(directory, ignore_errors=True)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    print("| saves by | GiB/s, median | slowest - fastest | peak memory, MiB |\n|---|---:|---:|---:|")
    for name, times in seconds.items():
        rates = [nbytes / taken / GIB for taken in times]
        print(
            f"| {name} | {statistics.median(rates):.2f} | {min(rates):.2f} - {max(rates):.2f} | {peaks[name] >> 20} |"
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gib", type=float, default=1.1, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--torch-rounds", type=int, default=3, help="torch takes seconds (default: %(default)s)")
    parser.add_argument("--save-to", type=Path, default=Path("/dev/shm"), help="default: %(default)s")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is")
    warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
    tensors = make_tensors(int(arguments.gib * GIB))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{cpu_model()}, {usable_cpus()} CPUs, Linux {platform.release()}, torch {torch.__version__}")
    for path in (
        hub_files(tensors, arguments.dir / f"hf-{nbytes}-{FILES}"),
        parts_of_rows(tensors, arguments.dir / f"hf-parts-{nbytes}-{RANKS}"),
    ):
        files = sorted(map(str, path.glob("*.safetensors")))
        warm(files)
        mount = mount_of(files[0])
        where = f"{mount.kind if mount else 'unknown file system'}, load average {os.getloadavg()[0]:.2f}"
        what = "parts of rows" if "parts" in path.name else "whole tensors"
        print(f"\n### {what}, {len(files)} files: {nbytes / GIB:.2f} GiB in {len(tensors)} tensors ({where})\n")
        measure(path, tensors, arguments.rounds, arguments.torch_rounds)
    saved = dict(list(tensors.items())[: len(tensors) // 2])
    print(f"\n### saved: {sum(tensor.nbytes for tensor in saved.values()) / GIB:.2f} GiB in {FILES} files\n")
    measure_saves(saved, arguments.save_to / "engine-loader-hf-saved", 5)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
