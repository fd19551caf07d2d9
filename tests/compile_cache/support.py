"""Small caches and stores for the tests."""

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_loader.compile_cache.directories import INDUCTOR, TRITON
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.scan import LocalFile, scan
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.restore import Restore
from engine_loader.compile_cache.process.save import save
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.stores.interface import Store, Stored
from engine_loader.compile_cache.trust import Trust
from engine_loader.settings import CompileCacheSettings

KEY = CacheKey((("torch", "2.13.0"), ("cuda", "13.0")), "model_tp1")
OTHER_KEY = CacheKey((("torch", "2.12.0"), ("cuda", "13.0")), "model_tp1")
TRITON_KERNEL = f"triton/XYZ{'A' * 49}/kernel.cubin"
"""Where Triton keeps a kernel: the digest has 52 characters."""
SECRET = Trust(b"sixteen bytes or more")


class Machine:
    """A machine of a fleet: local caches, and the store that it shares with the others."""

    def __init__(self, directory: Path, store: Path, trust: Trust = SECRET, store_name: str | None = None) -> None:
        self.directories = {"inductor": directory / "inductor", "triton": directory / "triton"}
        self.trust = trust
        self.store = FilesystemStore(store, trust, store_name=store_name)

    def write(self, path: str, content: bytes = b"", mtime_ns: int | None = None) -> Path:
        """Make a file of a local cache; ``path`` as in packs."""
        root, _, below = path.partition("/")
        file = self.directories[root] / below
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        if mtime_ns is not None:
            os.utime(file, ns=(mtime_ns, mtime_ns))
        return file

    def save(self, key: CacheKey = KEY, *, most_bytes: int = 1 << 40) -> Outcome:
        return self.save_files(scan_any(self.directories), key, most_bytes=most_bytes)

    def save_files(self, files: list[LocalFile], key: CacheKey = KEY, *, most_bytes: int = 1 << 40) -> Outcome:
        return save(self.store, key, self.directories, files, self.trust, threads=2, level=1, most_bytes=most_bytes)

    def restore(self, key: CacheKey = KEY, *, least_free_bytes: int = 0, threads: int = 2) -> Outcome:
        return Restore(
            self.store, key, self.directories, self.trust, threads=threads, least_free_bytes=least_free_bytes
        ).run()

    def content(self) -> dict[str, bytes]:
        """Path as in packs -> content, of everything in the local caches."""
        return {
            file.path: os.readlink(file.local).encode() if file.link else Path(file.local).read_bytes()
            for file in scan_any(self.directories)
        }

    def packs(self, key: CacheKey = KEY) -> list[Path]:
        return sorted(self.store.directory / stored.name for stored in self.store.list(key.prefix))


def scan_any(directories: Mapping[str, Path], messages: list[str] | None = None) -> list[LocalFile]:
    """All files of inductor's and Triton's caches, whatever they are called."""
    return scan((INDUCTOR, TRITON), directories, messages, made=lambda _cache, _path: True)


def unfinished(store: Store) -> list[Stored]:
    """What writers left that are still writing, or ended before they were done."""
    return [found for found in store.entries() if found.kind == "unfinished"]


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


class EngineNode:
    """A machine, and the settings of an engine there, which trusts whoever writes into its store.

    Args:
        settings: of the compile cache besides.
    """

    def __init__(self, machine: Machine, **settings: Any) -> None:
        self.machine = machine
        self.settings = CompileCacheSettings(
            directory=str(machine.store.directory),
            trust="anyone",
            min_store_free_bytes=0,
            min_local_free_bytes=0,
            **settings,
        )

    def directories(self) -> dict[str, str]:
        return {name: str(path) for name, path in self.machine.directories.items()}
