"""Shows that loading does not wait for the GIL: load_into beside a thread that spins in Python, and beside a process.

    python -m benchmarks.gil

An engine's own load_weights is such a thread. Two Python threads of preadv into the same parameters run beside it, too.
Rounds are interleaved; figures are medians.
"""

import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.arguments import parser_of
from benchmarks.checkpoints import kept_checkpoint
from engine_loader import open_checkpoint
from engine_loader.bench.plain_reads import read_plainly
from engine_loader.bench.workload import Parameters, Workload


def spin(stop: Callable[[], bool]) -> None:
    while not stop():
        sum(range(2000))


@contextmanager
def beside_a_thread() -> Iterator[None]:
    end = threading.Event()
    spinner = threading.Thread(target=spin, args=(end.is_set,), daemon=True)
    spinner.start()
    try:
        yield
    finally:
        end.set()
        spinner.join()


@contextmanager
def beside_a_process() -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    end, ready = context.Event(), context.Event()
    spinner = context.Process(target=_spin_process, args=(end, ready), daemon=True)
    spinner.start()
    ready.wait()
    try:
        yield
    finally:
        end.set()
        spinner.join()


def _spin_process(end: threading.Event, ready: threading.Event) -> None:
    ready.set()
    # Looking at the event costs a system call; the spinner is to spin.
    while not end.is_set():
        for _ in range(50):
            sum(range(2000))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    arguments = parser.parse_args()
    workload = Workload.of(kept_checkpoint(arguments.dir, 3.0, 6))
    parameters = Parameters(workload.tensors)
    parameters.poison()
    targets = parameters.tensors

    def ours() -> None:
        with open_checkpoint(workload.path, read_mode="buffered") as checkpoint:
            checkpoint.load_into(targets)

    readers: dict[str, Callable[[], object]] = {
        "load_into": ours,
        "2 Python threads of preadv": lambda: read_plainly(workload, targets, 2),
    }
    neighbours = {"a spinning process": beside_a_process, "a spinning Python thread": beside_a_thread}
    seconds: dict[tuple[str, str], list[float]] = {(name, other): [] for name in readers for other in neighbours}
    for _ in range(arguments.rounds):
        for other, beside in neighbours.items():
            with beside():
                for name, read in readers.items():
                    began = time.perf_counter()
                    read()
                    seconds[name, other].append(time.perf_counter() - began)
    print("| | " + " | ".join(f"beside {other}" for other in neighbours) + " | thread / process |")
    print("|---|" + "---:|" * (len(neighbours) + 1))
    for name in readers:
        rates = [workload.nbytes / statistics.median(seconds[name, other]) / 1e9 for other in neighbours]
        print(f"| {name} | " + " | ".join(f"{rate:.2f} GB/s" for rate in rates) + f" | {rates[1] / rates[0]:.2f} |")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
