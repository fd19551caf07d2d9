"""Many processes save, restore and prune at once, and are killed at random moments. `make test-chaos` takes some
minutes.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.key_packs import read_packs
from engine_loader.compile_cache.packs.verify import verify
from engine_loader.compile_cache.retention import GRACE_S, Policy, prune
from tests.compile_cache.support import SECRET, Machine, some_bytes, unfinished

PROCESSES = 16
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "12"))
OPERATIONS = PROCESSES * ROUNDS
# So many that each gets the same number of saves: a restore copies all that were ever saved under its key.
KEYS = [CacheKey((("torch", "2.13.0"),), f"model-{number}") for number in range(max(3, ROUNDS // 13))]
POLICY = Policy(days=30, keys=100, bytes=1 << 40, unfinished_s=3600)


def content_of(name: str) -> bytes:
    """Every file's content follows from its name, so that half a file, or another's, is found out."""
    seed = int(name.rpartition("-")[2])
    return some_bytes(seed % 90_000, seed)


def work(directory: Path, store: Path, journal: Path, seed: int, dies_in_save: bool) -> None:
    """Do one thing; what was saved is written to the journal when the save has returned."""
    chance = random.Random(seed)
    key = chance.choice(KEYS)
    machine = Machine(directory / key.scope, store)
    action = chance.choice(["save", "save", "restore", "restore", "compact", "prune"])
    if action == "save":
        machine.restore(key)
        names = [
            f"inductor/{chance.randrange(16):x}/file-{chance.randrange(1 << 40)}"
            for _ in range(chance.randrange(1, 12))
        ]
        for name in names:
            # As compilers do it: what dies meanwhile leaves nothing half there itself.
            unfinished = machine.write(f"inductor/../unfinished-{seed}", content_of(name))
            place = directory / key.scope / name
            place.parent.mkdir(parents=True, exist_ok=True)
            unfinished.replace(place)
        if dies_in_save:
            die_after(chance.random() * 0.02)
        assert machine.save(key).status in ("saved", "complete")
        with journal.open("a") as file:
            file.write(json.dumps({"key": key.scope, "names": names}) + "\n")
    elif action == "restore":
        outcome = machine.restore(key)
        assert not outcome.messages, outcome
        for name, content in machine.content().items():
            assert content == content_of(name), name
    elif action == "compact":
        compact(machine.store, key, SECRET, level=1, more_than=3)
    else:
        prune(machine.store, POLICY, SECRET, now=time.time() + GRACE_S + 1 if chance.random() < 0.1 else None)


def die_after(seconds: float) -> None:
    """Have the kernel end this process then, as SIGKILL would: nothing of ours hears of it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))


def run(directory: Path, store: Path, journal: Path, failures: Path, seed: int, dies: float | None, took: Any) -> None:
    # Most of what there is to do is not the save, so some are killed within it.
    dies_in_save = dies is not None and seed % 2 == 0
    if dies is not None and not dies_in_save:
        die_after(dies)
    began = time.monotonic()
    try:
        work(directory, store, journal, seed, dies_in_save)
        took[seed] = time.monotonic() - began
    except Exception as error:
        failures.with_name(f"failure-{seed}").write_text(repr(error))


@pytest.mark.slow
@pytest.mark.timeout(600 * max(1, ROUNDS // 12))
def test_nothing_is_ever_half_there_and_nothing_is_lost(tmp_path: Path) -> None:
    chance = random.Random(7)
    context = multiprocessing.get_context("fork")
    store, failures = tmp_path / "store", tmp_path / "failures"
    running: dict[int, tuple[multiprocessing.process.BaseProcess, Path]] = {}
    took = context.Array("d", OPERATIONS, lock=False)
    journals: list[Path] = []
    killed: set[int] = set()
    started = 0
    while started < OPERATIONS or running:
        while len(running) < PROCESSES and started < OPERATIONS:
            # Some machines are fresh, some have been used (and killed) before.
            directory = tmp_path / f"machine-{chance.randrange(3)}-{started % PROCESSES}"
            journal = tmp_path / f"journal-{started}"
            journals.append(journal)
            # At any moment of such work, and however fast the machine is.
            usual_s = statistics.median([one for one in took if one] or [0.1])
            dies = chance.random() * 1.5 * usual_s if chance.random() < 0.6 else None
            arguments = (directory, store, journal, failures, started, dies, took)
            process = context.Process(target=run, args=arguments)
            process.start()
            running[started] = (process, directory)
            started += 1
        for number, (process, directory) in list(running.items()):
            if not process.is_alive():
                process.join()
                del running[number]
                if process.exitcode == -signal.SIGALRM:
                    killed.add(number)
                # Machines come and go; all that ever were would fill the disk.
                if chance.random() < 0.5 and all(directory != other for _, other in running.values()):
                    shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.005)
    assert len(killed) > started // 10
    assert [path.read_text() for path in tmp_path.glob("failure-*")] == []
    final = Machine(tmp_path / "final", store)
    assert [one for one in verify(final.store, SECRET) if one.problem] == []
    for key in KEYS:
        messages: list[str] = []
        packs = read_packs(final.store, key, SECRET, messages)
        there = {file.path for pack in packs for file in pack.manifest.files}
        saved = {
            name
            for journal in journals
            if journal.exists()
            for line in journal.read_text().splitlines()
            if (entry := json.loads(line))["key"] == key.scope
            for name in entry["names"]
        }
        assert messages == []
        assert saved <= there, f"{len(saved - there)} files of {len(saved)} were lost"
    left = unfinished(final.store)
    prune(final.store, POLICY, SECRET, now=time.time() + 3601)
    assert unfinished(final.store) == []
    print(f"{started} operations, {len(killed)} killed, {len(left)} leftovers cleaned up")
