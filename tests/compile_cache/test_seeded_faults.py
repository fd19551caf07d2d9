"""Savers, restorers, compactors and pruners on one store, with deaths, full disks, stale handles, wrong clocks, damaged
bytes and files of others. Each round follows from its seed: FAULT_SEED=17 replays one, FAULT_ROUNDS=300 runs so many.
"""

import errno
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_loader.compile_cache.cache_errors import CacheError
from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.key_packs import read_packs
from engine_loader.compile_cache.process.restore import Restore
from engine_loader.compile_cache.process.save import save
from engine_loader.compile_cache.retention import GRACE_S, Policy, prune
from tests.compile_cache.support import SECRET, Machine, scan_any, some_bytes

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "25"))
SEEDS = [int(os.environ["FAULT_SEED"])] if "FAULT_SEED" in os.environ else list(range(ROUNDS))
OPERATIONS = 14
KEYS = [CacheKey((("torch", "2.13.0"),), f"model-{number}") for number in range(2)]
POLICY = Policy(days=30, keys=10, bytes=1 << 40, unfinished_s=3600)
DAY_S = 86400.0
SKEWS_S = (0.0, 0.0, 600.0, -600.0, 31 * DAY_S, 8 * 365 * DAY_S)
KILLED = 137
WRITES = ("write", "link", "replace", "rename", "mkdir")
READS = ("pread", "scandir", "lstat")


def content_of(path: str) -> bytes:
    """Every file's content follows from its path."""
    seed = int(path.rpartition("-")[2])
    return some_bytes(seed % 5000, seed)


class Faults:
    """One fault in a process: its n-th call of the system ends it, or fails."""

    def __init__(self, kind: str | None, step: int, skew_s: float) -> None:
        self._kind, self._left, self._skew_s = kind, step, skew_s

    def begin(self) -> None:
        """Put the fault in. There is no way back: for a process that does one thing and ends."""
        really = time.time
        time.time = lambda: really() + self._skew_s
        names = {"killed": (*WRITES, *READS, "open"), "full": WRITES, "stale": READS}.get(self._kind or "", ())
        for name in names:
            setattr(os, name, self._faulty(getattr(os, name)))

    def end(self) -> None:
        """From here on nothing fails any more."""
        self._left = -1

    def _faulty(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                if self._kind == "killed":
                    os._exit(KILLED)
                code = errno.ENOSPC if self._kind == "full" else errno.ESTALE
                raise OSError(code, os.strerror(code))
            return call(*args, **options)

        return faulty


class Round:
    """A store with its machines, and what is known of it."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.directory = directory
        self.store = directory / "store"
        self.saved: dict[str, set[str]] = {key.scope: set() for key in KEYS}
        self.damaged: dict[str, set[str]] = {key.scope: set() for key in KEYS}
        self.foreign: dict[Path, bytes] = {}

    def machine(self, key: CacheKey, number: int) -> Machine:
        return Machine(self.directory / f"machine-{number}" / key.scope, self.store)

    def run(self) -> None:
        self._child(lambda: self._save(KEYS[0], 0), Faults(None, 0, 0.0), KEYS[0])  # the marker of the store
        for _ in range(OPERATIONS):
            self.chance.choice([self._operate, self._operate, self._operate, self._damage, self._add_foreign])()
        self._check()

    def _operate(self) -> None:
        key, number = self.chance.choice(KEYS), self.chance.randrange(3)
        kind = self.chance.choice([None, None, "killed", "full", "stale"])
        faults = Faults(kind, self.chance.randrange(1, 60), self.chance.choice(SKEWS_S))
        action = self.chance.choice([self._save, self._save, self._restore, self._compact, self._prune])
        self._faults = faults
        self._child(lambda: action(key, number), faults, key)

    def _child(self, action: Callable[[], list[str]], faults: Faults, key: CacheKey) -> None:
        """Carry out an action in a process with a fault; what it reports to have saved is saved."""
        report, done = self.directory / "report", self.directory / "done"
        for path in (report, done):
            path.unlink(missing_ok=True)
        names = self._new_names()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self._names = names
                random.seed(0)
                faults.begin()
                try:
                    text = json.dumps(action())
                except (CacheError, OSError):  # reported to the caller: nothing was promised
                    text = "[]"
                faults.end()
                report.write_text(text)
                status = 0
            except BaseException as error:
                done.write_text(repr(error))
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, KILLED), done.read_text() if done.exists() else code
        if code == 0:
            self.saved[key.scope].update(json.loads(report.read_text()))

    def _new_names(self) -> list[str]:
        return [f"inductor/ab/kernel-{self.chance.randrange(1 << 30)}" for _ in range(self.chance.randrange(1, 5))]

    def _save(self, key: CacheKey, number: int) -> list[str]:
        machine = self.machine(key, number)
        for name in self._names:
            machine.write(name, content_of(name))
        files = scan_any(machine.directories)
        outcome = save(machine.store, key, machine.directories, files, SECRET, threads=1, level=1, most_bytes=1 << 40)
        return [file.path for file in files] if outcome.status in ("saved", "complete") and not outcome.messages else []

    def _restore(self, key: CacheKey, number: int) -> list[str]:
        machine = self.machine(key, number)
        outcome = Restore(machine.store, key, machine.directories, SECRET, threads=1).run()
        self._faults.end()
        self._are_right(machine)
        missing = self.saved[key.scope] - self.damaged[key.scope] - set(machine.content())
        assert not missing or outcome.messages, f"{len(missing)} files are missing and nothing is said of it: {outcome}"
        return []

    def _compact(self, key: CacheKey, number: int) -> list[str]:
        compact(self.machine(key, number).store, key, SECRET, level=1, more_than=1)
        return []

    def _prune(self, key: CacheKey, number: int) -> list[str]:
        store = self.machine(key, number).store
        prune(store, POLICY, SECRET, now=store.now() + GRACE_S + 1 if number == 0 else None)
        return []

    def _damage(self) -> None:
        """Change a byte of a pack, or of an index."""
        key = self.chance.choice(KEYS)
        of_index = self.chance.random() < 0.3
        paths = [self.store / key.prefix / "index"] if of_index else self.machine(key, 9).packs(key)
        paths = [path for path in paths if path.exists() and path not in self.foreign]
        if not paths:
            return
        path = self.chance.choice(paths)
        packs = read_packs(self.machine(key, 9).store, key, SECRET, [])
        for pack in packs:
            if path.name == pack.stored.base:
                self.damaged[key.scope].update(file.path for file in pack.manifest.files)
        content = bytearray(path.read_bytes())
        content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(content)

    def _add_foreign(self) -> None:
        junk = f"{self.chance.randrange(1 << 256):064x}.tar.zst"
        name = self.chance.choice(
            [
                "backups/2025/db.tar.zst",
                "README",
                f"{KEYS[0].prefix}/notes.txt",
                f"a/b/{junk}",
                f"{KEYS[1].prefix}/{junk}",
            ]
        )
        path = self.store / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_bytes(b"not of the cache")
        old = time.time() - 100 * DAY_S
        os.utime(path, (old, old))
        self.foreign[path] = b"not of the cache"

    def _are_right(self, machine: Machine) -> None:
        for path, content in machine.content().items():
            assert content == content_of(path), path

    def _check(self) -> None:
        for path, content in self.foreign.items():
            assert path.read_bytes() == content, path
        for key in KEYS:
            fresh = self.machine(key, 9)
            outcome = fresh.restore(key)
            self._are_right(fresh)
            lost = self.saved[key.scope] - self.damaged[key.scope] - set(fresh.content())
            assert not lost, f"{len(lost)} of {len(self.saved[key.scope])} saved files were lost: {outcome}"


@pytest.fixture(scope="module", autouse=True)
def _warmed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a process finds out once is known to every child, so that the n-th call is the same one in each replay."""
    machine = Machine(tmp_path_factory.mktemp("warm"), tmp_path_factory.mktemp("warm-store"))
    for number in range(2):
        machine.write(f"inductor/ab/kernel-{number}", content_of(f"kernel-{number}"))
        machine.save(KEYS[0])
    machine.restore(KEYS[0])
    compact(machine.store, KEYS[0], SECRET, level=1, more_than=1)
    prune(machine.store, POLICY, SECRET)


@pytest.mark.slow
@pytest.mark.timeout(300 + 5 * ROUNDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_foreign_is_deleted_nothing_saved_is_lost_and_restores_are_complete_or_say_so(
    tmp_path: Path, seed: int
) -> None:
    Round(tmp_path, seed).run()
