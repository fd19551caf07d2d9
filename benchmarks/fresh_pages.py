"""Measures native reads into fresh memory with small pages, with huge ones, and with those that were made sooner.

    python -m benchmarks.fresh_pages
    python -m benchmarks.fresh_pages --gib 1 --rounds 5 --memory given     # one of the two kinds of memory

The file lies in the page cache. Memory is either such as the host has given to this machine, or such as it may have
taken back: all of it was used, freed, and left alone for longer than the host waits (free page reporting). Every load
is a process of its own, as it is when an engine starts. Rounds are interleaved; figures are medians.
"""

import argparse
import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.arguments import parser_of
from engine_loader.bench import page_cache
from engine_loader.bench.rounds import back_free_memory
from engine_loader.sources.posix import PosixSource
from engine_loader.transfer.native.native_readers import NativeReaders
from engine_loader.transfer.plan import extent, make_extents

KINDS: dict[str, bool | Literal["always"]] = {"small": False, "huge": "always", "as timed": True}
MEMORY = ("given", "taken back")
LEFT_ALONE_S = 4.0
GB = 1e9


def load(path: Path, kind: str) -> float:
    """Seconds to read a file into fresh memory."""
    file = PosixSource().open(str(path))
    nbytes = file.size
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if kind == "small":
        area.madvise(mmap.MADV_NOHUGEPAGE)
    to = np.frombuffer(area, np.uint8)
    readers = NativeReaders(huge_pages=KINDS[kind], read_mode="buffered")
    began = time.perf_counter()
    readers.submit([file], make_extents([extent(0, 0, nbytes, to.ctypes.data)])).wait()
    seconds = time.perf_counter() - began
    readers.close()
    file.close()
    return seconds


def prepare(memory: str, nbytes: int) -> None:
    back_free_memory(nbytes)
    if memory == "taken back":
        time.sleep(LEFT_ALONE_S)


def measure(path: Path, rounds: int, memories: Sequence[str]) -> dict[tuple[str, str], list[float]]:
    nbytes = path.stat().st_size
    rates: dict[tuple[str, str], list[float]] = {(memory, kind): [] for memory in memories for kind in KINDS}
    for number in range(rounds):
        for memory in memories:
            kinds = list(KINDS)
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                prepare(memory, nbytes)
                command = [sys.executable, "-m", "benchmarks.fresh_pages", "--one", kind, "--file", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rates[memory, kind].append(nbytes / float(done.stdout) / GB)
                print(f"{memory}, {kind}: {rates[memory, kind][-1]:.2f} GB/s", file=sys.stderr, flush=True)
    return rates


def main() -> None:
    arguments = _arguments()
    if arguments.one:
        print(load(arguments.file, arguments.one))
        return
    path = arguments.file or _kept_file(arguments.dir, arguments.gib)
    page_cache.warm([str(path)])
    rates = measure(path, arguments.rounds, arguments.memory)
    print("| memory | pages | GB/s, median | slowest - fastest | of the better kind |\n|---|---|---:|---:|---:|")
    for memory in arguments.memory:
        better = max(statistics.median(rates[memory, kind]) for kind in ("small", "huge"))
        for kind in KINDS:
            found = rates[memory, kind]
            median = statistics.median(found)
            print(f"| {memory} | {kind} | {median:.2f} | {min(found):.2f} - {max(found):.2f} | {median / better:.2f} |")


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="what is loaded (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--memory", nargs="+", choices=MEMORY, default=[*MEMORY], help="(default: both)")
    parser.add_argument("--file", type=Path, help="load this file instead of one that is made")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _kept_file(folder: Path, gib: float) -> Path:
    path = folder / f"fresh-pages-{gib:g}.bin"
    nbytes = int(gib * (1 << 30))
    if not path.exists() or path.stat().st_size != nbytes:
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(1).bytes(16 << 20)
        with open(path, "wb") as file:
            for start in range(0, nbytes, len(noise)):
                file.write(noise[: nbytes - start])
    return path


if __name__ == "__main__":
    main()
