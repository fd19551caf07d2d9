"""The 3FS emulator for tests: built once, loaded into this process, its faults set and its counters read."""

import atexit
import ctypes
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from engine_loader.sources.threefs.shared_library import ThreeFsLibrary, load_library
from engine_loader.threefs_emulator import MOUNT_LIBRARY_NAME, build_emulator
from tests.support.mappings import mapped_of_shared_memory
from tests.support.resources import left_open, open_resources
from tests.support.waiting import GENEROUS_S

OF_THE_LIBRARY = "hf3fs-iov-"
KEPT = ("rings", "iovs", "registrations", "threads", "in_flight")


class Emulator:
    """The emulator in this process.

    Attributes:
        library: its path.
        mount: the directory that it takes for 3FS.
    """

    def __init__(self, library: Path, mount: Path) -> None:
        self.library = library
        self.mount = mount
        self.loaded: ThreeFsLibrary = load_library(library)
        self._calls = self.loaded.calls
        self._calls.hf3fs_emulator_count.restype = ctypes.c_int64
        self._shared_before = _shared_memory()
        self.set(f"mount={mount}")
        self._open_its_directory()

    @property
    def lib_dir(self) -> str:
        return str(self.library.parent)

    def set(self, options: str) -> None:
        assert self._calls.hf3fs_emulator_configure(options.encode()) == 0, options

    def count(self, what: str) -> int:
        count = int(self._calls.hf3fs_emulator_count(what.encode()))
        assert count >= 0, what
        return count

    def _open_its_directory(self) -> None:
        """With its first buffer the library opens 3fs-virt/iovs, for as long as the process lives."""
        iov = ctypes.create_string_buffer(312)
        size = ctypes.c_size_t(4096)
        assert self._calls.hf3fs_iovcreate(iov, str(self.mount).encode(), size, ctypes.c_size_t(0), -1) == 0
        self._calls.hf3fs_iovdestroy(iov)

    @property
    def bytes_of_all(self) -> int:
        """Bytes that all processes together have read from this mount."""
        return int.from_bytes((self.mount / "3fs-virt" / ".daemon" / ".link").read_bytes()[8:16], "little")

    def sweep(self) -> None:
        """What the daemon does when the kernel has closed the descriptors of processes that ended.

        It also removes the memory that these had not unlinked yet, which stays where the daemon is a real one.
        """
        self._calls.hf3fs_emulator_sweep()

    def links(self) -> list[str]:
        """The names of the buffers and rings that the daemon knows."""
        return sorted(os.listdir(self.mount / "3fs-virt" / "iovs"))

    def environment(self, options: str = "", *, whole_mount: bool = False) -> dict[str, str]:
        """What makes another process use an emulator of its own.

        Args:
            options: of that emulator.
            whole_mount: the emulated mount also answers the process's own calls, not only the library's.
        """
        preload = {"LD_PRELOAD": str(self.library.with_name(MOUNT_LIBRARY_NAME))} if whole_mount else {}
        return preload | {
            "HF3FS_LIB_DIR": self.lib_dir,
            "HF3FS_EMULATOR_MOUNT": str(self.mount),
            "HF3FS_EMULATOR_OPTIONS": options,
        }

    def leftovers(self) -> dict[str, object]:
        """What is still open, of rings, buffers, registrations, threads, shared memory and links."""
        found: dict[str, object] = {what: n for what in KEPT if (n := self.count(what))}
        shared = _shared_memory() - self._shared_before
        shared = shared and shared - _used_by_others()  # tests run in several processes
        links = self.links()
        return found | ({"shared memory": shared} if shared else {}) | ({"links": links} if links else {})

    def wait_until_clean(self, timeout_s: float = GENEROUS_S) -> dict[str, object]:
        """The leftovers, after a moment for threads to end."""
        end = time.monotonic() + timeout_s
        while (found := self.leftovers()) and time.monotonic() < end:
            time.sleep(0.01)
        return found


def _shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith((OF_THE_LIBRARY, "engine-loader-"))}


def _used_by_others() -> set[str]:
    """What other processes have mapped of /dev/shm, or open there."""
    others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    opened = set().union(*map(_open_files, others))
    names = set()
    for name in _shared_memory():
        with suppress(OSError):
            names |= {name} if os.stat(f"/dev/shm/{name}").st_ino in opened else set()
    return names.union(*map(mapped_of_shared_memory, others))


def _open_files(pid: int) -> set[int]:
    """The inodes of what a process has open. Not by names: a ledger gets its own when it is open already."""
    inodes = set()
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                inodes.add(os.stat(f"/proc/{pid}/fd/{fd}").st_ino)
    return inodes


@cache
def emulator() -> Emulator:
    """The one emulator of this process (a library is loaded once)."""
    directory = Path(tempfile.mkdtemp(prefix="3fs-emulator-")).resolve()
    mount = directory / "mount"
    mount.mkdir()
    running = Emulator(build_emulator(directory / "lib"), mount)
    atexit.register(_remove, running, directory, os.getpid())
    return running


def _remove(running: Emulator, directory: Path, owner: int) -> None:
    """At the end of the process that made it, not of its forks; what it started and killed leaves nothing, either."""
    if os.getpid() == owner:
        running.sweep()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def clean_emulator() -> Iterator[Emulator]:
    """The emulator without faults; afterwards nothing may be left open, and no rule broken."""
    running = emulator()
    running.set("reset")
    broken = running.count("violations")
    before = open_resources()
    yield running
    running.set("reset")
    gc.collect()  # what a caught exception still holds
    assert (left := running.wait_until_clean()) == {}, left
    assert running.count("violations") == broken
    assert left_open(before) == []


@contextmanager
def machine_with_3fs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """A clean emulator as the 3FS of this machine, which this process and those that it starts find by themselves."""
    with clean_emulator() as running:
        monkeypatch.setenv("HF3FS_LIB_DIR", running.lib_dir)
        monkeypatch.setenv("HF3FS_EMULATOR_MOUNT", str(running.mount))
        monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
        yield running


@dataclass(frozen=True)
class SanitizedEmulator:
    """An emulator compiled with sanitizers, for programs that are, too.

    Attributes:
        library: its path.
        mount: the directory that it takes for 3FS.
        file: one there, of random bytes.
    """

    library: Path
    mount: Path
    file: Path


def sanitized_emulator(place: Path, sanitizers: str, patch: pytest.MonkeyPatch) -> SanitizedEmulator:
    """Compile an emulator below ``place``; ``patch``'s environment tells it its mount."""
    patch.setenv("CC", f"cc -fsanitize={sanitizers} -fno-sanitize-recover=all -O1 -g -pthread")
    library = build_emulator(place / "lib")
    mount = (place / "mount").resolve()
    mount.mkdir(exist_ok=True)
    file = mount / "file"
    file.write_bytes(np.random.default_rng(1).bytes(700_001))
    patch.setenv("HF3FS_EMULATOR_MOUNT", str(mount))
    patch.setenv("HF3FS_EMULATOR_MAX_FILES", "65536")
    return SanitizedEmulator(library, mount, file)
