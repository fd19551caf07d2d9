"""Measures how fast a checkpoint's bytes reach parameters on a GPU, and prints Markdown for docs/cuda.md.

    python -m benchmarks.cuda

The limit is the lesser of two: copies out of page-locked memory (cudaMemcpyAsync) into the same parameters, and
threads of preadv that read the same files into page-locked memory. Beside this package run the other loaders that are
installed: pip install fastsafetensors runai-model-streamer instanttensor (with --no-deps where they would bring another
torch), each in a process of its own, with parameters of its own, that is stopped when it does not end in time. The
checkpoint is made once and reused. Every contender's parameters are compared with the files, byte for byte, before it
is measured, which also warms it up; rounds are interleaved; figures are medians. Without a GPU it says so and ends.
`--device cpu` rehearses it without one: what runs is then not what is to be measured.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.arguments import parser_of
from benchmarks.checkpoints import GIB, kept_checkpoint
from engine_loader.bench import contenders, page_cache, tables
from engine_loader.bench.contenders import Contender, Targets, stopwatch
from engine_loader.bench.workload import Workload
from engine_loader.loading.streaming.gds import obstacle_to_gds
from engine_loader.transfer.cpus import default_threads

PINNED_BYTES = 256 << 20
CHUNK_BYTES = 8 << 20
POISON = 0xA5
_PATIENCE_S = 10.0
_BEYOND = "device memory beyond, MiB"


@dataclass(frozen=True)
class Figures:
    """Of one load.

    Attributes:
        seconds: all of it: opening the files, reading headers, until the last byte is in its parameter.
        reading_seconds: of these, from the first tensor's bytes on; all, where a loader does not tell.
        cpu_seconds: of the process, all threads together.
        peak_bytes: memory of the device beyond the parameters, as torch's allocator counts it.
    """

    seconds: float
    reading_seconds: float
    cpu_seconds: float
    peak_bytes: int


class Runner(Protocol):
    """Where a contender runs."""

    def verify(self, checksums: dict[str, int]) -> None:
        """Load into poisoned parameters, and compare them; raises where they differ."""
        ...

    def run(self) -> Figures:
        """Load once."""
        ...


@dataclass
class Entry:
    """A contender, and what came of it.

    Attributes:
        error: why there are no figures, if there are none.
    """

    contender: Contender
    runner: Runner
    figures: list[Figures] = field(default_factory=list)
    error: str | None = None


def main() -> None:
    arguments = _arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here that torch can use: nothing was measured.")
        return
    device = torch.device(arguments.device)
    if device.type == "cpu":
        print("**A rehearsal, on the CPU: these figures say nothing about a GPU.**\n")
    path = kept_checkpoint(arguments.dir, arguments.gib, 6)
    workload = Workload.of(path)
    print(f"Machine: {_gpu(device)}{tables.machine_line(tables.describe_machine(workload))}.\n")
    print(f"Checkpoint: {tables.workload_line(workload)}. Medians of {arguments.rounds} interleaved rounds.")
    print(
        f"Other loaders run in processes of their own, and are stopped after {arguments.deadline:g} s without an end.\n"
    )
    for source in arguments.sources:
        with ExitStack() as stack:
            workload = stack.enter_context(_placed(source, path))
            entries = list(_entries(workload, device, arguments, stack))
            _verify(workload, entries)
            _measure(workload, entries, arguments.rounds, cold=source == "disk")
            print(_table(source, entries, workload.nbytes), flush=True)


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--gib", type=float, default=6.0, help="its size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="these contenders, and the limits")
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument(
        "--deadline", type=float, default=300.0, metavar="SECONDS", help="for one load of another loader (%(default)s)"
    )
    sources = ("cache", "tmpfs", "disk")
    parser.add_argument("--sources", nargs="+", choices=sources, default=list(sources), help="default: all")
    return parser.parse_args()


@contextmanager
def _placed(source: str, path: Path) -> Iterator[Workload]:
    """The checkpoint where it is to be read from. "cache" and "disk" are one place."""
    if source != "tmpfs":
        yield Workload.of(path)
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="engine-loader-") as copied:
        for file in path.iterdir():
            shutil.copy(file, copied)
        yield Workload.of(copied)


# --- contenders ------------------------------------------------------------------------------------------------------


def _entries(
    workload: Workload, device: torch.device, arguments: argparse.Namespace, stack: ExitStack
) -> Iterator[Entry]:
    parameters = _Parameters(workload, device)
    limits, ours = _limits(device), contenders.ours(device=device)
    ours[0] = contenders.ours()[0]  # what load_into fills says by itself where it is
    if device.type == "cuda" and obstacle_to_gds(device.index or 0) is None:
        ours.append(contenders.ours(device=device, transport="gds")[1])
    for contender in [*limits, *ours]:
        if contender.kind == "plain" or re.search(arguments.only, contender.name):
            yield Entry(contender, Here(contender, workload, parameters))
    for contender in contenders.installed_peers(device):
        if re.search(arguments.only, contender.name):
            apart = stack.enter_context(Apart(contender.name, workload, device, arguments.deadline))
            yield Entry(contender, apart)


def _limits(device: torch.device) -> list[Contender]:
    threads = default_threads()
    reads = _PinnedReads(device, threads)
    return [
        Contender("page-locked memory to the device", "plain", _PinnedCopies(device), fills=False),
        Contender(f"preadv, {threads} threads, to page-locked memory", "plain", reads, fills=False),
    ]


def _pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


class _PinnedCopies:
    """All of the parameters' bytes out of one page-locked buffer, asynchronously: what the bus gives."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = _pinned(PINNED_BYTES, device)

    def __call__(self, workload: Workload, targets: Targets) -> None:
        for target in targets.values():
            for part in torch.split(_bytes(target), PINNED_BYTES):
                part.copy_(self._buffer[: part.numel()], non_blocking=True)


class _PinnedReads:
    """All bytes of the files into page-locked memory, over and over: what the source gives."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._threads = threads
        self._buffers = _pinned(threads * CHUNK_BYTES, device).numpy()

    def __call__(self, workload: Workload, targets: Targets) -> None:
        files = workload.files
        chunks = [(file, at) for file in files for at in range(0, os.path.getsize(file), CHUNK_BYTES)]
        opened = {file: os.open(file, os.O_RDONLY) for file in files}

        def read(thread: int) -> None:
            memory = self._buffers.data[thread * CHUNK_BYTES : (thread + 1) * CHUNK_BYTES]
            for file, at in chunks[thread :: self._threads]:
                os.preadv(opened[file], [memory], at)

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(read, range(self._threads)))
        for descriptor in opened.values():
            os.close(descriptor)


class _Parameters:
    """Memory for the tensors of a workload, on a device."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        shapes = {info.name: info.as_torch() for info in workload.tensors}
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in shapes.items()}
        self._on_gpu = device.type == "cuda"

    def poison(self) -> None:
        for tensor in self.tensors.values():
            _bytes(tensor).fill_(POISON)

    def check(self, checksums: dict[str, int]) -> None:
        wrong = [
            name
            for name, tensor in self.tensors.items()
            if zlib.crc32(_bytes(tensor).cpu().numpy().data) != checksums[name]
        ]
        if wrong:
            raise ValueError(f"wrong bytes in {len(wrong)} tensors, e.g. {wrong[0]}")

    def timed(self, contender: Contender, workload: Workload) -> Figures:
        """One load."""
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self._on_gpu else 0
        stopwatch.began = None
        cpu, begin = time.process_time(), time.perf_counter()
        contender.load(workload, self.tensors)
        if self._on_gpu:
            torch.cuda.synchronize()
        end = time.perf_counter()
        return Figures(
            seconds=end - begin,
            reading_seconds=end - (stopwatch.began or begin),
            cpu_seconds=time.process_time() - cpu,
            peak_bytes=torch.cuda.max_memory_allocated() - before if self._on_gpu else 0,
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


class Here:
    """Runs a contender in this process."""

    def __init__(self, contender: Contender, workload: Workload, parameters: _Parameters) -> None:
        self._contender = contender
        self._workload = workload
        self._parameters = parameters

    def verify(self, checksums: dict[str, int]) -> None:
        self._parameters.poison()
        self.run()
        if self._contender.fills:
            self._parameters.check(checksums)

    def run(self) -> Figures:
        return self._parameters.timed(self._contender, self._workload)


class Apart:
    """Runs a peer in a process of its own, which is stopped when it does not answer in time. A context manager."""

    def __init__(self, name: str, workload: Workload, device: torch.device, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, workload, device), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which ends it, unless it hangs
        self._process.join(_PATIENCE_S)
        self._process.kill()
        self._process.join()

    def verify(self, checksums: dict[str, int]) -> None:
        self._ask(checksums)

    def run(self) -> Figures:
        figures: Figures = self._ask(None)
        return figures

    def _ask(self, question: dict[str, int] | None) -> Any:
        try:
            self._connection.send(question)
            if not self._connection.poll(self._deadline_s):
                self._process.kill()
                self._process.join()
                raise TimeoutError(f"no end within {self._deadline_s:g} s: stopped")
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join()
            raise RuntimeError(f"its process ended with status {self._process.exitcode}") from error
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def _serve(connection: Connection, name: str, workload: Workload, device: torch.device) -> None:
    """What the process of a peer does: verify when it is sent checksums, else run."""
    contender = next(one for one in contenders.installed_peers(device) if one.name == name)
    here = Here(contender, workload, _Parameters(workload, device))
    while True:
        try:
            checksums = connection.recv()
        except EOFError:
            return
        try:
            answer: Figures | None = None
            if checksums is None:
                answer = here.run()
            else:
                here.verify(checksums)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            connection.send(answer)


# --- measuring -------------------------------------------------------------------------------------------------------


def _verify(workload: Workload, entries: Sequence[Entry]) -> None:
    checksums = workload.checksums()
    for entry in entries:
        try:
            entry.runner.verify(checksums)
        except Exception as error:
            entry.error = str(error)


def _measure(workload: Workload, entries: Sequence[Entry], rounds: int, *, cold: bool) -> None:
    for _ in range(rounds):
        for entry in entries:
            if entry.error is not None:
                continue
            (page_cache.drop if cold else page_cache.warm)(workload.files)
            try:
                entry.figures.append(entry.runner.run())
            except Exception as error:
                entry.error = str(error)


def _table(source: str, entries: Sequence[Entry], nbytes: int) -> str:
    def median(entry: Entry, name: str) -> float:
        return float(statistics.median(getattr(figures, name) for figures in entry.figures))

    sound = [entry for entry in entries if entry.error is None]
    speeds = {entry.contender.name: nbytes / median(entry, "seconds") / 1e9 for entry in sound}
    limits = [speeds[entry.contender.name] for entry in sound if entry.contender.kind == "plain"]
    limit = min(limits) if limits else max(speeds.values(), default=0.0)
    columns = ("into parameters", "s", "first byte to last tensor, s", "GB/s", "of the limit", "CPU s")
    rows = [
        f"From {source}:\n",
        f"| {' | '.join(columns)} | device memory beyond, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        name = f"{entry.contender.name} {entry.contender.version if entry.contender.kind == 'peer' else ''}".rstrip()
        if entry.error is not None:
            rows.append(f"| {name} | {entry.error} | | | | | |")
            continue
        speed, peak = speeds[entry.contender.name], max(figures.peak_bytes for figures in entry.figures) / (1 << 20)
        times = f"{median(entry, 'seconds'):.2f} | {median(entry, 'reading_seconds'):.2f}"
        cpu = f"{median(entry, 'cpu_seconds'):.2f}"
        rows.append(f"| {name} | {times} | {speed:.2f} | {speed / limit:.2f} | {cpu} | {peak:.0f} |")
    return "\n".join(rows) + "\n"


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda or torch.version.hip}; "


if __name__ == "__main__":
    main()
