"""A restored cache that ends its engine ends it once: the next start goes without, and others are warned."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_loader.compile_cache.directories import STATE
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.leftovers import clear_leftovers
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.trials import EngineProcess, begin_trial, end_trial, engine_lock, failed_trials
from engine_loader.compile_cache.process.use import note_use
from engine_loader.compile_cache.trust import Trust
from tests.compile_cache.support import KEY, OTHER_KEY, EngineNode, Machine

KERNEL = f"triton/{'A' * 52}/kernel.cubin"
GROUP = f"triton/{'A' * 52}/__grp__kernel.json"


class Engine:
    """A start of an engine, in a process of its own that can crash."""

    def __init__(self) -> None:
        self.since_ns = time.time_ns()
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def crash(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


class Node(EngineNode):
    @property
    def home(self) -> Path:
        return next(iter(self.machine.directories.values()))

    def restore(self, engine: Engine | None, key: Any = KEY) -> Outcome:
        job = Job("restore", "torch", key, self.directories())
        if engine is not None:
            job = Job(
                "restore", "torch", key, self.directories(), since_ns=engine.since_ns, engine_pid=engine.process.pid
            )
        return perform(job, self.settings)

    def save(self, since_ns: int = 0) -> Outcome:
        return perform(Job("save", "torch", KEY, self.directories(), since_ns=since_ns), self.settings)

    def suspects(self) -> list[str]:
        return [entry.name for entry in self.machine.store.entries(KEY.prefix) if entry.kind == "suspect"]


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    started: list[Engine] = []
    yield started
    for engine in started:
        engine.crash()


@pytest.fixture
def start(engines: list[Engine]) -> Any:
    def begin() -> Engine:
        engines.append(Engine())
        return engines[-1]

    return begin


@pytest.fixture
def poisoned(tmp_path: Path, store: Path) -> Machine:
    """A machine whose pack the others restore."""
    machine = Machine(tmp_path / "origin", store, Trust(anyone=True))
    machine.write("inductor/ab/kernel.so", b"poison" * 100, mtime_ns=10**18)
    machine.write(KERNEL, b"cubin", mtime_ns=10**18)
    machine.write(GROUP, json.dumps({"child_paths": {"k": str(machine.directories["triton"] / "k")}}).encode())
    machine.save()
    return machine


@pytest.fixture
def node(tmp_path: Path, poisoned: Machine) -> Node:
    return Node(Machine(tmp_path / "node", poisoned.store.directory, Trust(anyone=True)))


@pytest.fixture
def other(tmp_path: Path, poisoned: Machine) -> Node:
    return Node(Machine(tmp_path / "other", poisoned.store.directory, Trust(anyone=True)))


def test_the_start_after_a_crash_goes_without_a_restore(node: Node, start: Any, poisoned: Machine) -> None:
    first = start()
    assert node.restore(first).status == "restored"
    assert set(node.machine.content()) == {"inductor/ab/kernel.so", KERNEL, GROUP}
    first.crash()
    outcome = node.restore(start())
    assert (outcome.status, outcome.files) == ("suspect", 0)
    (message,) = outcome.messages
    assert poisoned.packs()[0].name in message
    assert "the 3 files that it brought were moved" in message
    assert "engine-loader compile-cache quarantine" in message
    (aside,) = (node.machine.directories["inductor"] / STATE).glob("suspect-*")
    assert (aside / "ab/kernel.so").read_bytes() == b"poison" * 100
    assert node.machine.content() == {}
    assert not (node.machine.directories["inductor"] / "ab").exists()


def test_the_one_after_that_restores_again(node: Node, start: Any) -> None:
    first = start()
    node.restore(first)
    first.crash()
    node.restore(start())
    assert node.restore(start()).status == "restored"


def test_what_is_compiled_instead_is_what_the_next_machine_gets(node: Node, other: Node, start: Any) -> None:
    first = start()
    node.restore(first)
    first.crash()
    second = start()
    node.restore(second)
    node.machine.write("inductor/ab/kernel.so", b"sound code")
    end_trial(node.home, second.since_ns)
    assert node.save().status == "saved"
    assert other.restore(start()).status == "restored"
    assert other.machine.content()["inductor/ab/kernel.so"] == b"sound code"


def test_an_engine_that_became_ready_is_no_crash(node: Node, start: Any) -> None:
    first = start()
    node.restore(first)
    end_trial(node.home, first.since_ns)
    first.crash()
    assert node.restore(start()).status == "complete"
    assert len(node.machine.content()) == 3


def test_an_engine_that_is_still_starting_is_no_crash(node: Node, start: Any) -> None:
    node.restore(start())
    assert node.restore(start()).status == "complete"
    assert len(failed_trials(node.home)) == 0


def test_an_engine_of_another_container_is_known_by_its_lock(node: Node, start: Any) -> None:
    """Its process has no number here."""
    first = start()
    lock = engine_lock(node.home, first.since_ns)
    assert lock.acquire(0)
    node.restore(first)
    first.crash()
    assert node.restore(start()).status == "complete"
    lock.release()
    assert node.restore(start()).status == "suspect"
    assert not list((node.home / STATE).glob("trial-*"))


def test_a_number_that_another_process_has_now_is_a_crash() -> None:
    this = EngineProcess.of(os.getpid())
    assert this.is_running()
    assert not EngineProcess(this.pid, this.started + 1, this.boot).is_running()
    assert not EngineProcess(this.pid, this.started, "another boot").is_running()


def test_what_was_changed_since_stays(node: Node, start: Any) -> None:
    first = start()
    node.restore(first)
    first.crash()
    node.machine.write("inductor/ab/kernel.so", b"compiled anew")
    node.restore(start())
    assert (node.machine.directories["inductor"] / "ab/kernel.so").read_bytes() == b"compiled anew"


def test_files_that_were_there_before_the_restore_are_no_suspects(node: Node, start: Any) -> None:
    node.machine.write("inductor/ab/kernel.so", b"mine")
    first = start()
    node.restore(first)
    first.crash()
    node.restore(start())
    assert (node.machine.directories["inductor"] / "ab/kernel.so").read_bytes() == b"mine"


def test_a_crash_of_another_model_sets_its_files_aside_and_this_one_restores(node: Node, start: Any) -> None:
    node.machine.write("inductor/cd/other.so", b"other")
    node.machine.save(OTHER_KEY)
    (node.machine.directories["inductor"] / "cd/other.so").unlink()
    first = start()
    assert node.restore(first, OTHER_KEY).status == "restored"
    first.crash()
    assert node.restore(start()).status == "restored"
    assert not (node.machine.directories["inductor"] / "cd/other.so").exists()
    assert (node.machine.directories["inductor"] / "ab/kernel.so").exists()


def test_a_restore_by_hand_is_not_put_on_trial(node: Node, start: Any) -> None:
    assert node.restore(None).status == "restored"
    assert node.restore(start()).status == "complete"


def test_other_nodes_are_warned_and_a_hit_takes_the_warning_back(node: Node, other: Node, start: Any) -> None:
    first = start()
    node.restore(first)
    first.crash()
    assert "other nodes" in node.restore(start()).messages[0]
    assert len(node.suspects()) == 1
    second = start()
    outcome = other.restore(second)
    assert outcome.status == "restored"
    (message,) = outcome.messages
    assert os.uname().nodename in message
    assert "ended before it was ready" in message
    note_use(other.home, "rank_0", (), {})
    saved = other.save(second.since_ns)
    assert saved.verdict == "hit"
    assert node.suspects() == []


def test_a_node_that_may_not_write_leaves_no_note(node: Node, start: Any) -> None:
    reading = Node(node.machine, read_only=True)
    first = start()
    reading.restore(first)
    first.crash()
    assert reading.restore(start()).status == "suspect"
    assert node.suspects() == []


def test_the_marker_is_there_before_the_files(node: Node, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it moves files has them on trial."""

    def killed(*_args: Any) -> list[str]:
        assert failed_trials(node.home) == []
        engine.crash()
        (trial,) = failed_trials(node.home)
        assert {row[0] for row in trial.files} == {"inductor/ab/kernel.so", KERNEL, GROUP}
        raise OSError("killed")

    engine = start()
    monkeypatch.setattr("engine_loader.compile_cache.process.restore.move_into_place", killed)
    assert node.restore(engine).status == "failed"
    assert len(failed_trials(node.home)) == 1


def test_a_marker_that_cannot_be_read_is_passed_over(node: Node, start: Any) -> None:
    begin_trial(node.home, KEY.prefix, os.getpid(), 7)
    (node.home / STATE).mkdir(parents=True)
    (node.home / STATE / "trial-7.json").write_text("{")
    assert node.restore(start()).status == "restored"


def test_what_was_set_aside_goes_after_a_week(tmp_path: Path) -> None:
    old, new = (tmp_path / STATE / f"suspect-{name}" for name in ("old", "new"))
    for place in (old, new):
        place.mkdir(parents=True)
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    clear_leftovers(tmp_path, 3600)
    assert (old.exists(), new.exists()) == (False, True)
