"""A compile cache's restore and save against `zstd -d -T0 | tar x` and `tar c | zstd -T0` of the same files on the
same disk.

python -m benchmarks.compile_cache [--bytes 1073741824] [--files 5000] [--rounds 5]
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine_loader.compile_cache.directories import INDUCTOR
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.scan import scan
from engine_loader.compile_cache.process.restore import Restore
from engine_loader.compile_cache.process.save import save
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.trust import Trust
from engine_loader.machine import cpu_model, usable_cpus

KEY = CacheKey((("benchmark", "1"),), "all")
TRUST = Trust(b"a key of a benchmark, not secret")
SUFFIXES = (".so", ".py", ".h", ".cpp", ".json", ".pyc")


def material() -> Iterator[bytes]:
    """What caches are made of: compiled code, sources, pickles, from this Python's own packages."""
    top = Path(sys.executable).parent.parent
    paths = sorted(path for path in top.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    random.Random(1).shuffle(paths)
    while True:
        for path in paths:
            with path.open("rb") as file:
                while content := file.read(8 << 20):
                    yield content


_LETTERS = "abcdefghijklmnop"


def make_files(directory: Path, count: int, total: int) -> None:
    """``count`` files of ``total`` bytes together, of very different sizes, in directories like inductor's."""
    chance = random.Random(2)
    weights = [chance.lognormvariate(0, 1.2) for _ in range(count)]
    sizes = [int(total * weight / sum(weights)) for weight in weights]
    source, rest = material(), b""
    for number, size in enumerate(sizes):
        parts, have = [rest], len(rest)
        while have < size:
            part = next(source)
            parts.append(part)
            have += len(part)
        content = b"".join(parts)
        rest = content[size:]
        path = directory / f"{_LETTERS[number % 16]}{_LETTERS[number // 16 % 16]}" / f"kernel_{number}.o"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content[:size])


def shell(command: str) -> Callable[[], object]:
    return lambda: subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True)


def seconds(action: Callable[[], object]) -> float:
    os.sync()  # what the round before wrote is not this one's
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def compare(directory: Path, count: int, total: int, rounds: int, threads: int) -> bool:
    files, store, target = directory / "files", directory / "store", directory / "restored"
    make_files(files, count, total)
    archive, unpacked = directory / "plain.tar.zst", directory / "unpacked"
    timings: dict[str, list[float]] = {"save": [], "tar c | zstd -T0": [], "restore": [], "zstd -d -T0 | tar x": []}

    def our_save() -> None:
        found = scan([INDUCTOR], {"inductor": files})
        # A store knows its marker, and each round has a new directory.
        outcome = save(
            FilesystemStore(store, TRUST),
            KEY,
            {"inductor": files},
            found,
            TRUST,
            threads=threads,
            level=3,
            most_bytes=1 << 40,
        )
        assert outcome.files == count, outcome

    def our_restore() -> None:
        outcome = Restore(FilesystemStore(store, TRUST), KEY, {"inductor": target}, TRUST, threads=threads).run()
        assert outcome.files == count, outcome

    for _ in range(rounds):
        for path in (store, target, unpacked):
            shutil.rmtree(path, ignore_errors=True)
        archive.unlink(missing_ok=True)
        unpacked.mkdir()
        timings["save"].append(seconds(our_save))
        timings["tar c | zstd -T0"].append(
            seconds(shell(f"tar c -C {files} . | zstd -q -T0 -o {archive} && sync {archive}"))
        )
        timings["restore"].append(seconds(our_restore))
        timings["zstd -d -T0 | tar x"].append(seconds(shell(f"zstd -q -d -T0 -c {archive} | tar x -C {unpacked}")))
    machine = f"{cpu_model()}, {usable_cpus()} CPUs"
    print(f"{machine}; {total / 2**30:.2f} GiB in {count} files, {rounds} rounds, {threads} threads")
    medians = {name: statistics.median(values) for name, values in timings.items()}
    for name, values in timings.items():
        rate = total / medians[name] / 1e6
        spread = f"({min(values):.2f} to {max(values):.2f})"
        print(f"  {name:22} {medians[name]:6.2f} s   {spread:18} {rate:6.0f} MB/s")
    good = True
    for ours, plain in (("save", "tar c | zstd -T0"), ("restore", "zstd -d -T0 | tar x")):
        ratio = medians[ours] / medians[plain]
        good &= ratio <= 1.2
        print(f"  {ours}: {ratio:.2f} x `{plain}` (at most 1.2)")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    arguments = parser.parse_args()
    if not shutil.which("zstd"):
        print("the command zstd is not there: nothing to compare with (apt-get install zstd)")
        return 0
    with tempfile.TemporaryDirectory(prefix="compile-cache-", dir=arguments.directory) as directory:
        return (
            0 if compare(Path(directory), arguments.files, arguments.bytes, arguments.rounds, arguments.threads) else 1
        )


if __name__ == "__main__":
    sys.exit(main())
