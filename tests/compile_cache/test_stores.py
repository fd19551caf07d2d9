"""Stores that fail: full, read-only, gone, hanging. An outcome says what happened, and nothing half-written is left."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.process.session import Running, run_job
from engine_loader.compile_cache.retention import Policy, prune
from engine_loader.compile_cache.stores.leases import save_slot
from engine_loader.compile_cache.stores.object_names import MARKER
from engine_loader.settings import CompileCacheSettings
from tests.compile_cache.support import KEY, Machine, some_bytes
from tests.support.waiting import GENEROUS_S, LAST_S, wait_for


def settings_for(store: Path, **values: object) -> CompileCacheSettings:
    return CompileCacheSettings(directory=str(store), min_store_free_bytes=0, min_local_free_bytes=0, **values)  # type: ignore[arg-type]


def job(action: str, machine: Machine, settings: CompileCacheSettings | None = None, **values: object) -> Job:
    directories = {name: str(path) for name, path in machine.directories.items()}
    told = {} if settings is None else settings.model_dump(mode="json")
    return Job(action, "torch", KEY, directories, settings=told, **values)  # type: ignore[arg-type]


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "tmpfs"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", place], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_job_goes_through_a_process_of_its_own(first: Machine, second: Machine, store: Path) -> None:
    settings = settings_for(store)
    assert run_job(job("save", first, settings, background=True), GENEROUS_S).status == "saved"
    outcome = run_job(job("restore", second, settings), GENEROUS_S)
    assert (outcome.status, outcome.files) == ("restored", 4)
    assert second.content() == first.content()


def test_a_store_that_fills_up_interrupts_a_save_and_keeps_nothing_of_it(first: Machine, tmpfs: Path) -> None:
    first.write("inductor/ab/large.so", some_bytes(6 << 20))
    outcome = perform(job("save", first), settings_for(tmpfs / "store"))
    assert outcome.status == "interrupted"
    assert str(tmpfs) in outcome.messages[0]
    assert [path.name for path in tmpfs.rglob("*") if path.is_file()] == [MARKER]


def test_a_file_too_large_for_a_pack_is_told_of_and_the_others_are_saved(
    first: Machine, second: Machine, store: Path
) -> None:
    first.write("inductor/ab/large.so", b"")
    os.truncate(first.directories["inductor"] / "ab/large.so", 5 << 30)
    outcome = perform(job("save", first), settings_for(store))
    assert outcome.status == "saved"
    (message,) = outcome.messages
    assert "inductor/ab/large.so has 5.0 GiB" in message
    assert perform(job("restore", second), settings_for(store)).files == 4


def test_a_local_disk_that_fills_up_interrupts_a_restore_and_keeps_nothing_of_it(
    first: Machine, store: Path, tmpfs: Path
) -> None:
    first.write("inductor/ab/large.so", some_bytes(6 << 20))
    assert perform(job("save", first), settings_for(store)).status == "saved"
    small = Machine(tmpfs, store)
    outcome = perform(job("restore", small), settings_for(store))
    assert outcome.status == "interrupted"
    assert str(tmpfs) in outcome.messages[0]
    assert small.content() == {}


def test_a_disk_that_is_full_all_at_once(
    first: Machine, store: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the room between the look and the write."""
    monkeypatch.setattr("engine_loader.compile_cache.space.free_bytes", lambda _path: None)
    first.write("inductor/ab/large.so", some_bytes(6 << 20))
    perform(job("save", first), settings_for(store))
    small = Machine(tmpfs, store)
    outcome = perform(job("restore", small), settings_for(store))
    assert outcome.status == "interrupted"
    assert os.strerror(errno.ENOSPC) in outcome.messages[0]
    assert small.content() == {}
    outcome = perform(job("save", first), settings_for(tmpfs / "store"))
    assert outcome.status == "interrupted"


def test_a_floor_is_honoured(first: Machine, store: Path) -> None:
    settings = CompileCacheSettings(directory=str(store), min_store_free_bytes=1 << 50)
    outcome = perform(job("save", first), settings)
    assert outcome.status == "interrupted"
    assert "min_store_free_bytes" in outcome.messages[0]


def test_a_read_only_store_is_restored_from_and_a_save_says_why_not(
    first: Machine, second: Machine, tmpfs: Path
) -> None:
    store = tmpfs / "store"
    perform(job("save", first), settings_for(store))
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    assert perform(job("restore", second), settings_for(store)).status == "restored"
    second.write("inductor/ab/new.so", b"new")
    outcome = perform(job("save", second), settings_for(store))
    assert outcome.status == "failed"
    assert os.strerror(errno.EROFS) in outcome.messages[0]
    assert str(store) in outcome.messages[0]


def test_a_setting_keeps_a_machine_from_writing(first: Machine, store: Path) -> None:
    outcome = perform(job("save", first), settings_for(store, read_only=True))
    assert outcome.status == "nothing"
    assert not store.exists()


def test_switched_off_does_nothing(first: Machine, store: Path) -> None:
    assert perform(job("save", first), settings_for(store, enabled=False)).status == "off"
    assert not store.exists()


def test_a_store_that_vanishes_in_the_middle(first: Machine, second: Machine, store: Path) -> None:
    for number in range(20):
        first.write(f"inductor/ab/{number}.so", some_bytes(1 << 20, number))
    perform(job("save", first), settings_for(store))
    calls = 0

    def vanish() -> bool:
        nonlocal calls
        calls += 1
        if calls == 2:
            shutil.rmtree(store)
        return True

    outcome = perform(job("restore", second), settings_for(store), vanish)
    assert outcome.status in ("restored", "failed", "nothing")  # what was opened can still be read
    if outcome.status != "restored":
        assert second.content() == {}
    assert perform(job("restore", second), settings_for(store)).status == "nothing"
    assert perform(job("save", first), settings_for(store)).status == "saved"


def test_a_store_that_hangs_is_given_up(second: Machine, store: Path) -> None:
    place = store / KEY.prefix
    place.mkdir(parents=True, mode=0o700)
    store.chmod(0o700)
    # A pipe that nobody writes to: the worker waits in the kernel when it opens it, for ever.
    settings = settings_for(store)
    (second.directories["inductor"] / ".engine_loader").mkdir(parents=True, mode=0o700)
    fifo = store / "key"
    os.mkfifo(fifo, 0o600)
    outcome = run_job(job("restore", second, settings.model_copy(update={"key_file": str(fifo)})), 1.0)
    assert outcome.status == "interrupted"
    assert "restore_timeout_s" in outcome.messages[0]


def test_a_process_that_cannot_start_is_an_outcome(
    first: Machine, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    told: list[str] = []
    done = threading.Event()

    def then(outcome: object) -> None:
        told.append(outcome.status)  # type: ignore[attr-defined]
        done.set()

    Running(job("save", first, settings_for(store)), settings_for(store), GENEROUS_S, then=then)
    assert done.wait(GENEROUS_S)
    assert told == ["failed"]


def test_too_many_saves_at_once_are_passed_over(first: Machine, store: Path) -> None:
    first.store.found()
    with save_slot(first.store, 1, 3600) as is_free:
        assert is_free
        outcome = perform(job("save", first), settings_for(store, max_concurrent_saves=1))
    assert outcome.status == "nothing"
    assert "other saves" in outcome.messages[0]
    assert perform(job("save", first), settings_for(store, max_concurrent_saves=1)).status == "saved"
    assert not list((store / "saving").iterdir())


def test_a_save_that_died_long_ago_is_none_that_is_under_way(first: Machine, store: Path) -> None:
    first.store.found()
    note = f"saving/{1:032x}"
    first.store.replace(note, b"")
    os.utime(store / note, (time.time() - 7200,) * 2)
    with save_slot(first.store, 1, 3600) as is_free:
        assert is_free
    prune(first.store, Policy(days=30, keys=9, bytes=1 << 40, unfinished_s=3600), first.trust)
    assert not list((store / "saving").iterdir())


@pytest.mark.timeout(3 * LAST_S)
def test_a_save_that_is_ended_half_way_leaves_nothing(first: Machine, store: Path) -> None:
    """As at the shutdown of a pod: SIGTERM, at different moments."""
    for number in range(60):
        first.write(f"inductor/ab/{number}.so", some_bytes(1 << 20, number))
    told = store.parent / "job"
    told.write_text(json.dumps(job("save", first, settings_for(store, compression_level=19, threads=1)).to_json()))
    ended = 0
    for wait_s in (0, 0.3, 0.6):
        program = [sys.executable, "-m", "engine_loader.compile_cache.process.worker", told, store.parent / "outcome"]
        process = subprocess.Popen(program)
        wait_for(lambda process=process: process.poll() is not None or list(store.rglob(".unfinished-*")), LAST_S)
        time.sleep(wait_s)
        process.send_signal(signal.SIGTERM)
        ended += process.wait(GENEROUS_S) != 0
        assert not list(store.rglob(".unfinished-*"))
    assert ended


def test_a_job_ends_also_when_the_engine_forks_its_workers_meanwhile(first: Machine, store: Path) -> None:
    """A forked worker keeps what is open at that moment, for as long as it lives."""
    running = Running(job("save", first, settings_for(store)), settings_for(store), GENEROUS_S)
    workers = []
    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        workers.append(pid)
        time.sleep(0.01)
    try:
        outcome = running.result(GENEROUS_S)  # the workers live longer
        assert outcome is not None
        assert outcome.status == "saved"
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
