"""Measures reading from 3FS by USRBIO on the emulator, and prints Markdown for docs/performance.md.

    python benchmarks/usrbio.py
    python benchmarks/usrbio.py --processes 8      # at once, on one link
    python benchmarks/usrbio.py --io-depth -8 --io-mib 8 --readers native --only "each request"
    python benchmarks/usrbio.py --published DIR    # beside the published reader, unpacked (pip install -t DIR --no-deps
                                                   # fastsafetensor-3fs-reader==0.3.3)

One file is read into touched memory of the CPU: over a link of 2 GB/s with no and with 2 ms of latency for each IO, and
without a limit, where this package's own POSIX reads are the yardstick. Every reader has a process of its own with an
emulator of its own; they take turns; figures are medians. The emulator's copying costs CPU time that a NIC's DMA does
not, so without a limit it is also measured with pages mapped in place of copies (option dma).
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MIB = 1 << 20
LINK = 2_000_000_000
SCENARIOS = {
    "a link of 2 GB/s": f"bandwidth={LINK}",
    "a link of 2 GB/s, 2 ms of latency for each IO": f"bandwidth={LINK},latency_us=2000",
    **{
        f"a link of 2 GB/s, the limits of a daemon as shipped, {ms} ms for each request": (
            f"bandwidth={LINK},limits=1,latency_us={ms * 1000}"
        )
        for ms in (0, 2, 10)
    },
    **{
        f"{title}, 40 ms for each request and no limit of a link": f"limits=1,latency_us=40000{options}"
        for title, options in {
            "requests as a daemon is shipped (32)": "",
            "twice as many requests": ",requests=64,server_requests=16",
            "an eighth of a daemon's jobs (14) and many requests": ",requests=256,server_requests=64,batches=14",
        }.items()
    },
    "no limit": "",
    "no limit, bytes by DMA": "dma=1",
}
READERS = {
    "native": "engine_loader, native",
    "python": "engine_loader, pure Python",
    "published": "fastsafetensor-3fs-reader 0.3.3",
    "published-pipelined": "fastsafetensor-3fs-reader 0.3.3, pipelined",
    "posix": "engine_loader, native, POSIX",
}


@dataclass
class Child:
    """A reader in a process of its own."""

    process: subprocess.Popen[str]
    rates: list[float] = field(default_factory=list)

    def measure(self) -> float:
        self.start()
        return self.finish()

    def start(self) -> None:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)

    def finish(self) -> float:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"a reader ended: status {self.process.wait()}")
        return float(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _serve(arguments.child, arguments.file)
        return
    from engine_loader.machine import cpu_model, usable_cpus
    from engine_loader.threefs_emulator import build_emulator

    with tempfile.TemporaryDirectory(prefix="engine-loader-usrbio-") as directory:
        library = build_emulator(Path(directory) / "lib")
        mount = Path(directory).resolve() / "mount"
        mount.mkdir()
        file = mount / "file"
        _fill(file, arguments.mib * MIB)
        print(f"Machine: {cpu_model()}, {usable_cpus()} CPUs, load average {os.getloadavg()[0]:.2f} at the start.")
        print(f"One file of {arguments.mib} MiB; medians of {arguments.rounds} rounds, taken in turns.\n")
        for scenario, options in SCENARIOS.items():
            if arguments.only not in scenario:
                continue
            environment = {
                **os.environ,
                "HF3FS_LIB_DIR": str(library.parent),
                "HF3FS_EMULATOR_MOUNT": str(mount),
                "HF3FS_EMULATOR_OPTIONS": options,
                "BENCHMARK_IO_DEPTH": str(arguments.io_depth),
                "BENCHMARK_IO_BYTES": str(arguments.io_mib * MIB),
            }
            if arguments.processes > 1:
                _node(scenario, file, arguments, environment)
                continue
            names = [name for name in arguments.readers if _takes_part(name, options, arguments.published)]
            _scenario(scenario, names, file, arguments, environment, options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each reads it (default: %(default)s)")
    parser.add_argument("--published", type=Path, metavar="DIR", help="where fastsafetensor_3fs_reader is")
    parser.add_argument("--processes", type=int, default=1, help="at once, on one link (default: %(default)s)")
    parser.add_argument("--io-depth", type=int, default=-1, help="usrbio_io_depth (default: %(default)s)")
    parser.add_argument("--io-mib", type=int, default=4, help="io_bytes (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="scenarios whose title has it")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=[*READERS], help="(default: all)")
    parser.add_argument("--child", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _fill(path: Path, nbytes: int) -> None:
    import numpy as np

    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        for _ in range(nbytes // (64 * MIB)):
            file.write(rng.bytes(64 * MIB))
        file.write(rng.bytes(nbytes % (64 * MIB)))


def _takes_part(name: str, options: str, published: Path | None) -> bool:
    if name.startswith("published"):
        # It reads from the buffer that dma replaces while its own next read is in flight only.
        return published is not None
    return name != "posix" or not ("limits" in options or "bandwidth" in options)


def _scenario(
    title: str,
    names: list[str],
    file: Path,
    arguments: argparse.Namespace,
    environment: dict[str, str],
    options: str,
) -> None:
    children = {name: _start(name, file, arguments.published, environment) for name in names}
    try:
        for child in children.values():
            child.measure()
        for _ in range(arguments.rounds):
            for child in children.values():
                child.rates.append(child.measure())
    finally:
        for child in children.values():
            child.close()
    limit, of = _allowed(options, arguments), "what is allowed"
    if limit == math.inf:
        limit, of = statistics.median(children["posix"].rates), "POSIX"
    print(f"### {title[0].upper()}{title[1:]}\n")
    print(f"| reader | GB/s, median | slowest - fastest | of {of} |\n|---|---:|---:|---:|")
    for name, child in children.items():
        median, worst, best = statistics.median(child.rates), min(child.rates), max(child.rates)
        figures = f"{median / 1e9:.2f} | {worst / 1e9:.2f} - {best / 1e9:.2f} | {median / limit:.2f}"
        print(f"| {READERS[name]} | {figures} |")
    print()


def _allowed(options: str, arguments: argparse.Namespace) -> float:
    """Bytes per second that the link and the daemon's limits allow; infinite where there are none."""
    known = {name: int(value) for name, _, value in (option.partition("=") for option in options.split(",") if option)}
    rates = [known.get("bandwidth", math.inf)]
    seconds = known.get("latency_us", 0) / 1e6
    if "limits" in known and seconds:
        job = -arguments.io_depth * arguments.io_mib * MIB
        rates += [known.get("requests", 32) * MIB / seconds, known.get("batches", 112) * job / seconds]
    return min(rates)


def _node(title: str, file: Path, arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    """All processes of a node at once: how much of the link they use together, and how evenly."""
    if "bandwidth" not in environment["HF3FS_EMULATOR_OPTIONS"]:
        return
    environment["HF3FS_EMULATOR_OPTIONS"] += ",shared_link=1"
    children = [_start("native", file, None, environment) for _ in range(arguments.processes)]
    totals, shares = [], []
    try:
        for child in children:
            child.measure()
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            for child in children:
                child.start()
            rates = [child.finish() for child in children]
            totals.append(len(children) * file.stat().st_size / (time.perf_counter() - began))
            shares.append(min(rates) / max(rates))
    finally:
        for child in children:
            child.close()
    total = statistics.median(totals)
    print(f"### {title[0].upper()}{title[1:]}, {len(children)} processes at once\n")
    print(f"{total / 1e9:.2f} GB/s together, {total / LINK:.2f} of the link; the slowest is at ", end="")
    print(f"{statistics.median(shares):.2f} of the fastest.\n")


def _start(name: str, file: Path, published: Path | None, environment: dict[str, str]) -> Child:
    path = [str(ROOT), *([str(published)] if published else [])]
    command = [sys.executable, __file__, "--child", name, "--file", str(file)]
    return Child(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.pathsep.join(path)},
            text=True,
        )
    )


def _serve(name: str, file: Path) -> None:
    """Read once for every line that comes; answer with bytes per second."""
    import numpy as np

    target = np.ones(file.stat().st_size, np.uint8)
    expected = np.fromfile(file, np.uint8, 1 << 20, offset=len(target) // 2)
    read = _published(name, file, target) if name.startswith("published") else _ours(name, file, target)
    for _ in sys.stdin:
        target[len(target) // 2 :][: 1 << 20] = 0
        began = time.perf_counter()
        read()
        seconds = time.perf_counter() - began
        if not (target[len(target) // 2 :][: 1 << 20] == expected).all():
            sys.exit("wrong bytes")
        print(len(target) / seconds, flush=True)


def _ours(name: str, path: Path, target: "object") -> Callable[[], object]:
    from pydantic import ByteSize

    from engine_loader.settings import LoaderSettings
    from engine_loader.sources.registry import make_source
    from engine_loader.transfer.constructor import make_readers
    from engine_loader.transfer.plan import extent, make_extents

    settings = LoaderSettings(
        backend="posix" if name == "posix" else "usrbio",
        engine="python" if name == "python" else "cpp",
        usrbio_io_depth=int(os.environ["BENCHMARK_IO_DEPTH"]),
        io_bytes=ByteSize(os.environ["BENCHMARK_IO_BYTES"]),
    )
    file = make_source(settings.backend, settings=settings).open(str(path))
    readers = make_readers(settings)
    plan = make_extents([extent(0, 0, file.size, target.ctypes.data)])  # type: ignore[attr-defined]
    return lambda: readers.submit([file], plan).wait()


def _published(name: str, path: Path, target: "object") -> Callable[[], object]:
    from fastsafetensor_3fs_reader import ThreeFSFileReader

    pipelined = name.endswith("pipelined")
    # Its documentation's best: 8 MiB alone, 16 MiB pipelined.
    size = (16 if pipelined else 8) * MIB
    reader = ThreeFSFileReader(mount_point=str(path.parent), buffer_size=size)
    address, nbytes = target.ctypes.data, len(target)  # type: ignore[attr-defined,arg-type]
    return lambda: reader.read_chunked(str(path), address, 0, nbytes, 0, pipelined)


if __name__ == "__main__":
    main()
