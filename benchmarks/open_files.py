"""Measures what a plan of one file costs to submit beside many open files on 3FS's emulator, and reading all of them.

    python -m benchmarks.open_files                # 1,000 files of 64 KiB
    python -m benchmarks.open_files --kib 65536    # 1,000 of 64 MiB (sparse)

Direct mode submits a plan every 32 MiB, so this is paid thousands of times in a load.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from engine_loader.settings import LoaderSettings
from engine_loader.sources.registry import make_source
from engine_loader.threefs_emulator import build_emulator
from engine_loader.transfer.constructor import make_readers
from engine_loader.transfer.plan import extent, make_extents

KIB, MIB = 1 << 10, 1 << 20
TRIES = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--kib", type=int, default=64, help="size of each (default: %(default)s)")
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * arguments.files)), hard))
    with tempfile.TemporaryDirectory(prefix="engine-loader-open-files-") as directory:
        mount = Path(directory).resolve() / "mount"
        mount.mkdir()
        os.environ["HF3FS_LIB_DIR"] = str(build_emulator(Path(directory) / "lib").parent)
        os.environ["HF3FS_EMULATOR_MOUNT"] = str(mount)
        _measure(mount, arguments.files, arguments.kib * KIB)


def _measure(mount: Path, count: int, nbytes: int) -> None:
    paths = [mount / f"{number}.bin" for number in range(count)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(nbytes)
    settings = LoaderSettings(backend="usrbio", engine="cpp")
    source, readers = make_source("usrbio", settings=settings), make_readers(settings)
    files = [source.open(str(path)) for path in paths]
    target = np.ones(min(64 * KIB, nbytes), np.uint8)
    print("| open files | a plan of one of them, us |\n|---:|---:|")
    for opened in sorted({1, 10, 100, count}):
        plan = make_extents([extent(opened - 1, 0, target.nbytes, target.ctypes.data)])
        times = []
        for _ in range(TRIES):
            began = time.perf_counter()
            transfer = readers.submit(files[:opened], plan)
            times.append(time.perf_counter() - began)
            transfer.wait()
        print(f"| {opened} | {statistics.median(times) * 1e6:.0f} |")
    whole = np.ones(max(nbytes, 1), np.uint8)
    plan = make_extents([extent(number, 0, nbytes, whole.ctypes.data) for number in range(count)])
    began = time.perf_counter()
    readers.submit(files, plan).wait()
    seconds = time.perf_counter() - began
    rate = count * nbytes / seconds / 1e9
    print(f"\nAll {count} files of {nbytes >> 10} KiB in one plan: {seconds:.2f} s, {rate:.2f} GB/s.")
    for opened_file in files:
        opened_file.close()
    readers.close()


if __name__ == "__main__":
    main()
