"""What it is worth to read .so and .pyc files before they are imported, where each read takes its time.

    python -m benchmarks.warm_imports [--latency-ms 10] [--rounds 3]

Copies of extension modules, of the libraries that they need, and of compiled modules lie on a file system by FUSE
(``slow_fuse``, for root), mounted anew for each measurement, so that nothing of it is in the page cache. A program
imports the extensions, loads the libraries, and reads and unmarshals the compiled modules, as imports do.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.slow_fuse import mounted
from engine_loader.machine import cpu_model
from engine_loader.report.load_report import human_bytes
from engine_loader.start.page_reading import Budget, WarmingEach
from engine_loader.start.page_warmer import warm_each

SITE = Path(sysconfig.get_path("purelib"))
EXTENSIONS = ("tokenizers/tokenizers.abi3.so", "hf_xet/hf_xet.abi3.so", "obstore/_obstore.abi3.so")
LIBRARIES = ("numpy.libs/*.so*", "llvmlite/binding/libllvmlite.so")
MODULES = "sympy/**/*.pyc"
MOST_MODULES = 600
PROGRAM = """
import ctypes, importlib, marshal, os, sys
place = sys.argv[1]
sys.path.insert(0, place)
for name in sorted(os.listdir(place)):
    path = os.path.join(place, name)
    if name.endswith(".abi3.so"):
        importlib.import_module(name.removesuffix(".abi3.so"))
    elif ".so" in name:
        ctypes.CDLL(path)
    else:
        with open(path, "rb") as file:
            file.seek(16)
            marshal.load(file)
"""


def copy_files(place: Path) -> list[str]:
    """The names of what was copied."""
    found = [SITE / name for name in EXTENSIONS if (SITE / name).is_file()]
    found += [path for pattern in LIBRARIES for path in sorted(SITE.glob(pattern))]
    for path in found:
        shutil.copy(path, place / path.name)
    for number, path in enumerate(sorted(SITE.glob(MODULES))[:MOST_MODULES]):
        shutil.copy(path, place / f"m{number}.pyc")
    return sorted(os.listdir(place))


def imported_s(place: Path) -> float:
    """Seconds that the program takes."""
    began = time.monotonic()
    env = {**os.environ, "LD_LIBRARY_PATH": str(place)}
    subprocess.run([sys.executable, "-I", "-S", "-c", PROGRAM, str(place)], check=True, env=env)
    return time.monotonic() - began


def print_seconds(rows: Mapping[str, Sequence[float]]) -> None:
    """A line for each row: median, least and most of its seconds, and the ratio of its median to the first row's."""
    first = statistics.median(next(iter(rows.values())))
    for name, seconds in rows.items():
        median = statistics.median(seconds)
        print(f"{name:<24}{median:8.2f} s  {min(seconds):8.2f} - {max(seconds):.2f}  {median / first:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=10.0, help="that each read takes")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    alone, warming, warmed, resident = [], [], [], []
    with tempfile.TemporaryDirectory() as directory:
        files, place = Path(directory, "files"), Path(directory, "slow")
        files.mkdir()
        place.mkdir()
        names = copy_files(files)
        nbytes = sum((files / name).stat().st_size for name in names)
        libraries = sum(".so" in name for name in names)
        print(f"{cpu_model()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
        print(f"{libraries} .so and {len(names) - libraries} .pyc files, {human_bytes(nbytes)}")
        print(f"{options.latency_ms:g} ms a read, medians of {options.rounds} rounds")
        for _ in range(options.rounds):
            with mounted(files, place, latency_s=options.latency_ms / 1e3):
                alone.append(imported_s(place))
                resident.append(imported_s(place))
            with mounted(files, place, latency_s=options.latency_ms / 1e3):
                each = WarmingEach([str(place / name) for name in names], Budget())
                warm_each(each)
                warming.append(each.seconds)
                warmed.append(imported_s(place))
    rows = {
        "import, cold": alone,
        "warm": warming,
        "import behind it": warmed,
        "warm and import": [sum(pair) for pair in zip(warming, warmed, strict=True)],
        "import, all resident": resident,
    }
    print_seconds(rows)


if __name__ == "__main__":
    main()
