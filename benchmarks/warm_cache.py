"""What it is worth to read ahead what a restore of the compile cache reads, where each read takes its time.

    python -m benchmarks.warm_cache [--latency-ms 10] [--rounds 3] [--bytes 300000000] [--directory DIR]

The pack and the index of a key lie on a file system by FUSE (``slow_fuse``, for root), mounted anew for each
measurement, so that nothing of them is in the page cache. What is read ahead is what the first restore has read, as
`engine-loader warm` does it.
"""

import argparse
import os
import shutil
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.compile_cache import KEY, TRUST, make_files
from benchmarks.slow_fuse import mounted
from benchmarks.warm_imports import print_seconds
from engine_loader.compile_cache.directories import INDUCTOR
from engine_loader.compile_cache.packs.scan import scan
from engine_loader.compile_cache.process.restore import Restore
from engine_loader.compile_cache.process.save import save
from engine_loader.compile_cache.store_reads import Reads, joined_reads
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.engines.common.start.cache_ahead import WarmingStore, ahead_in_words
from engine_loader.machine import cpu_model, usable_cpus
from engine_loader.report.load_report import human_bytes
from engine_loader.start.page_reading import Budget
from engine_loader.start.page_warmer import warm_each

FILES = 2000


class Measured:
    """A store whose key lies on a slow file system, and a place into which it is restored.

    Args:
        directory: for everything.
        nbytes: of the files that are packed.
        latency_s: that each read of the store takes.
    """

    def __init__(self, directory: Path, nbytes: int, latency_s: float) -> None:
        self.read: Reads = {}
        self.store, self._target = directory / "store", directory / "restored"
        self._latency_s = latency_s
        files = directory / "files"
        make_files(files, FILES, nbytes)
        found = scan([INDUCTOR], {"inductor": files})
        saved = save(
            FilesystemStore(self.store, TRUST),
            KEY,
            {"inductor": files},
            found,
            TRUST,
            threads=usable_cpus(),
            level=3,
            most_bytes=1 << 40,
        )
        assert saved.files == FILES, saved
        shutil.rmtree(files)
        self.pack_bytes = saved.pack_bytes
        self._kept = directory / "kept"
        (self.store / KEY.prefix).rename(self._kept)
        (self.store / KEY.prefix).mkdir()

    def mounted(self) -> AbstractContextManager[Path]:
        """While the block runs, the key's pack and index are there, and not in the page cache."""
        return mounted(self._kept, self.store / KEY.prefix, latency_s=self._latency_s)

    def restored_s(self) -> float:
        """Seconds that a restore of everything takes."""
        shutil.rmtree(self._target, ignore_errors=True)
        os.sync()  # what was written before is not this one's
        store = FilesystemStore(self.store, TRUST)
        began = time.monotonic()
        done = Restore(store, KEY, {"inductor": self._target}, TRUST, threads=usable_cpus()).run()
        seconds = time.monotonic() - began
        assert done.files == FILES, done
        self.read = joined_reads(store.reads)
        return seconds

    def ahead(self) -> WarmingStore:
        """What the last restore has read, read into the page cache."""
        os.sync()
        done = WarmingStore(self.store, self.read, Budget())
        warm_each(done)
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=10.0, help="that each read takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=300_000_000, help="of the files that are packed")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    options = parser.parse_args()
    cold, warming, warmed, resident = [], [], [], []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        measured = Measured(Path(directory), options.bytes, options.latency_ms / 1e3)
        print(f"{cpu_model()}, {usable_cpus()} CPUs, load average {os.getloadavg()[0]:.1f}")
        print(f"{FILES} files, {human_bytes(options.bytes)}, in a pack of {human_bytes(measured.pack_bytes)}")
        print(f"{options.latency_ms:g} ms a read, medians of {options.rounds} rounds")
        for _ in range(options.rounds):
            with measured.mounted():
                cold.append(measured.restored_s())
                resident.append(measured.restored_s())
            with measured.mounted():
                done = measured.ahead()
                warming.append(done.seconds)
                print(ahead_in_words(done))
                warmed.append(measured.restored_s())
    rows = {
        "restore, cold": cold,
        "read ahead": warming,
        "restore behind it": warmed,
        "read ahead and restore": [sum(pair) for pair in zip(warming, warmed, strict=True)],
        "restore, all resident": resident,
    }
    print_seconds(rows)


if __name__ == "__main__":
    main()
