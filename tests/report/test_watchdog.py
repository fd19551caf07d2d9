"""Stalls of a start, each named while it goes on, and told once."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine_loader.compile_cache.process.locks import NodeLock
from engine_loader.engines.common import cache_hooks
from engine_loader.engines.common.start.phase_wrappers import record
from engine_loader.loading import weights as loading_weights
from engine_loader.loading.open_store import store_of_files
from engine_loader.loading.shards import OpenFiles
from engine_loader.report import phases
from engine_loader.report.events import LOCK, PLACE, PROGRESS, START, Recorder
from engine_loader.report.reading.account import account_of
from engine_loader.report.reading.timeline import read_timeline
from engine_loader.report.slow_ranks import slow_ranks
from engine_loader.report.watchdog import Watchdog
from engine_loader.settings import CompileCacheSettings, LoaderSettings
from tests.support.checkpoints import checkpoint, entry
from tests.support.sources import FakeFile, FakeSource, Stuck

from .made_starts import WALL, MadeStart


class Watched:
    """A process's recorder with a watchdog whose clock a test sets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.recorder = Recorder()
        self.recorder.note_process("worker")
        self.said: list[str] = []
        self.later_s = 0.0
        self._watchdog = Watchdog(self.recorder, 20.0, self.said.append, clock=lambda: time.monotonic() + self.later_s)

    def after(self, *seconds: float) -> list[str]:
        """What it has said when it has looked at each of these times."""
        for self.later_s in seconds:
            self._watchdog.check()
        return self.said


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    directory = tmp_path / "start"
    directory.mkdir()
    monkeypatch.setenv(START, str(directory))
    made = Watched(directory)
    yield made
    made.recorder.switch_off()


def test_a_start_that_goes_on_is_not_complained_of(watched: Watched) -> None:
    with watched.recorder.span(phases.WARM_UP), watched.recorder.span(phases.COMPILE):
        assert watched.after(0, 19, 60, 110) == []


@pytest.mark.parametrize(
    ("phase", "patience_s", "words"),
    [
        (phases.CONFIGURATION, 60, "configuration has taken 61 s so far; is a model hub out of reach?"),
        (phases.INSPECTION, 60, "model inspection has taken 61 s so far"),
        (phases.DEVICE, 60, "device has taken 61 s so far; do all ranks run, and reach each other?"),
        (phases.MODEL_CREATION, 60, "model creation has taken 61 s so far"),
        (phases.WEIGHTS, 60, "weights has taken 61 s so far"),
        (phases.COMPILE, 120, "compile has taken 121 s so far; a restored compile cache saves it in later starts"),
        (phases.WARM_UP, 120, "warm-up has taken 121 s so far"),
        (phases.GRAPH_CAPTURE, 120, "graph capture has taken 121 s so far"),
        (phases.AFTER_WEIGHTS, 120, "after weights has taken 121 s so far"),
        (phases.KV_CACHE, 60, "KV cache has taken 61 s so far"),
        (phases.SERVER, 60, "server has taken 61 s so far"),
    ],
)
def test_a_phase_that_takes_too_long_is_named_once(watched: Watched, phase: str, patience_s: float, words: str) -> None:
    with watched.recorder.span(phase):
        assert watched.after(patience_s - 1) == []
        (said,) = watched.after(patience_s + 1, patience_s + 100)
    assert said.startswith(words)


def test_of_phases_within_each_other_the_innermost_is_named(watched: Watched) -> None:
    with watched.recorder.span(phases.WARM_UP), watched.recorder.span(phases.COMPILE):
        (said,) = watched.after(121)
    assert said.startswith("compile")


def test_a_phase_counts_from_the_last_thing_that_ended_within_it(watched: Watched) -> None:
    with watched.recorder.span(phases.DEVICE):
        time.sleep(0.01)
        with watched.recorder.span(phases.RESTORE_WAIT):
            pass
        ended = max(watched.recorder.last_ends.values())
        watched.recorder.open[1] = (phases.DEVICE, ended - 500, *watched.recorder.open[1][2:])
        assert watched.after(55) == []
        assert len(watched.after(61)) == 1


def test_a_source_that_gives_no_byte_is_named_with_what_has_come(watched: Watched) -> None:
    counts = [3 << 30, 10 << 30]
    details = {PLACE: "/proc/models/a.safetensors", PROGRESS: lambda: (*counts, "source")}
    with watched.recorder.span(phases.WEIGHT_READING, watched=details):
        assert watched.after(0, 19) == []
        counts[0] += 1 << 30  # it goes on
        assert watched.after(21, 40) == []
        (said,) = watched.after(42, 90)
    assert said == (
        "no byte of the weights for 21 s from /proc/models/a.safetensors (proc): 4.00 GiB of 10.0 GiB are there"
    )


def test_an_engine_that_works_on_after_the_last_byte_is_no_stall_of_the_source(watched: Watched) -> None:
    details = {PLACE: "/models", PROGRESS: lambda: (10, 10, "engine")}
    with watched.recorder.span(phases.WEIGHT_READING, watched=details):
        assert watched.after(0, 100) == []


def write_shard(path: Path) -> str:
    save_file({f"t{number}": torch.zeros(256, 256) for number in range(4)}, path)
    return str(path)


def test_a_source_that_hangs_in_a_load_is_named_with_its_file(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real load, whose bytes do not come before they are released."""
    monkeypatch.setattr(loading_weights, "recorder", watched.recorder)
    file = FakeFile(checkpoint({"a": entry("U8", [1 << 20])}), "/proc/model.safetensors")
    source, settings = FakeSource({file.path: file}), LoaderSettings(mode="stream", engine="python", threads=1)
    store = store_of_files(source, OpenFiles(source, [file.path]), settings)
    monkeypatch.setattr(loading_weights, "open_weights", lambda *_: store)
    stuck = file.behave = Stuck()
    names: list[str] = []
    load = loading_weights.stream_weights([file.path], settings)
    thread = threading.Thread(target=lambda: names.extend(name for name, _ in load))
    thread.start()
    while not stuck.reads:
        time.sleep(0.01)
    try:
        (said,) = watched.after(0, 25)
    finally:
        stuck.release()
        thread.join()
    assert said.startswith("no byte of the weights for 25 s from /proc/model.safetensors (proc): 0 B of 1.00 MiB are")
    assert names == ["a"]


def test_an_engine_that_takes_no_weights_is_not_blamed_on_the_source(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real load, of which the engine does not take the second tensor."""
    monkeypatch.setattr(loading_weights, "recorder", watched.recorder)
    file = write_shard(tmp_path / "model.safetensors")
    tensors = loading_weights.stream_weights([file], LoaderSettings(mode="stream"))
    next(tensors)
    (said,) = watched.after(0, 25)
    assert said == (
        "the engine has taken no weights for 25 s, and the source is not what it waits for: 0 B of 1.00 MiB are there"
    )
    assert len(list(tensors)) == 3
    assert watched.recorder.open == {}


def test_a_mount_that_hangs_while_weights_are_opened_is_named(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_weights, "recorder", watched.recorder)
    opening, released = threading.Event(), threading.Event()

    def hang(*_: object) -> Any:
        opening.set()
        released.wait()
        raise OSError("given up")

    monkeypatch.setattr(loading_weights, "open_weights", hang)
    thread = threading.Thread(target=_expecting, args=(OSError, _read_all, [str(tmp_path / "a.safetensors")]))
    thread.start()
    opening.wait()
    try:
        (said,) = watched.after(21)
    finally:
        released.set()
        thread.join()
    assert said.startswith(f"opening the weights at {tmp_path / 'a.safetensors'} (")
    assert "has taken 21 s so far" in said


def _read_all(files: list[str]) -> None:
    for _ in loading_weights.stream_weights(files, LoaderSettings()):
        pass


def _expecting(error: type[BaseException], action: Callable[..., object], *args: object) -> None:
    with pytest.raises(error):
        action(*args)


def test_the_holder_of_the_lock_of_the_restore_is_named(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process of this node restores, and does not end."""
    monkeypatch.setattr(cache_hooks, "recorder", watched.recorder)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    lock = NodeLock(tmp_path / "vllm", cache_hooks.RESTORE_LOCK)
    assert lock.acquire(0)
    lock.release()
    program = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        wait = threading.Thread(target=cache_hooks.wait_for_node, args=("vllm", CompileCacheSettings(), time.time_ns()))
        wait.start()
        while not watched.recorder.open:
            time.sleep(0.01)
        (said,) = watched.after(31)
        holder.communicate("")
        wait.join()
    assert said == f"waiting for 31 s for the compile cache's restore, whose lock pid {holder.pid} holds"
    assert watched.recorder.open == {}


def test_a_restore_that_does_not_end_is_named_with_its_store(watched: Watched) -> None:
    with watched.recorder.span(phases.RESTORE, beside=True, watched={PLACE: "s3://bucket/caches"}):
        (said,) = watched.after(25)
    assert said == "the compile cache's restore from s3://bucket/caches has taken 25 s so far"


def test_a_wait_without_a_lock_that_can_be_looked_at_is_told_all_the_same(watched: Watched) -> None:
    with watched.recorder.span(phases.RESTORE_WAIT, watched={LOCK: "/nowhere/restore.lock"}):
        assert watched.after(25) == ["waiting for 25 s for the compile cache's restore"]


def engine_with_ranks(directory: Path, *spans: list[Any]) -> MadeStart:
    start = MadeStart(directory)
    start.process("engine core", ("worker processes", 0, None, {"waits": True}), pid=1, parent=0)
    for rank, found in enumerate(spans):
        start.process("worker", ("Python and imports", 0, 5), *found, pid=10 + rank, rank=rank)
    return start


def texts(start: MadeStart, now: float) -> list[str]:
    return [stall.text for stall in slow_ranks(read_timeline(start.directory), now, 20.0)]


def test_a_rank_that_has_not_begun_to_load_is_named(tmp_path: Path) -> None:
    loading = [("weights", 10, None)]
    start = engine_with_ranks(tmp_path, loading, loading, loading, [("device", 6, None)])
    assert texts(start, 29) == []
    assert texts(start, 31) == [
        'rank 3 has not begun to load weights, and the others did 21 s ago: it is in the phase "device" (pid 13 on one)'
    ]


def test_a_rank_that_loads_longer_than_all_others_is_named(tmp_path: Path) -> None:
    start = engine_with_ranks(tmp_path, [("weights", 10, 30)], [("weights", 10, None), ("weight reading", 11, None)])
    assert texts(start, 49) == []
    assert texts(start, 55) == [
        'rank 1 is still loading weights, and the others ended 25 s ago: it is in the phase "weight reading" '
        "(pid 11 on one)"
    ]


def test_a_rank_that_compiles_longer_than_all_others_is_named(tmp_path: Path) -> None:
    done = [("weights", 10, 20), ("warm-up", 20, 50)]
    start = engine_with_ranks(tmp_path, done, [("weights", 10, 20), ("warm-up", 20, None), ("compile", 21, None)])
    (said,) = texts(start, 75)
    assert said.startswith('rank 1 is still warming up, and the others ended 25 s ago: it is in the phase "compile"')


def test_ranks_that_are_all_slow_are_not_compared(tmp_path: Path) -> None:
    loading = [("weights", 10, None)]
    assert texts(engine_with_ranks(tmp_path, loading, loading), 500) == []
    assert texts(engine_with_ranks(tmp_path / "one", loading), 500) == []


def test_the_process_that_waits_for_workers_looks_at_their_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = engine_with_ranks(tmp_path, [("weights", 10, None)], [])
    monkeypatch.setenv(START, str(start.directory))
    monkeypatch.setattr("engine_loader.report.watchdog.time.time", lambda: WALL + 35)
    watching = Watched(start.directory)
    with watching.recorder.span(phases.WORKER_PROCESSES, waits=True):
        (said,) = watching.after(0, 5)
    watching.recorder.switch_off()
    assert said.startswith("rank 1 has not begun to load weights, and the others did 25 s ago")


def test_a_stall_is_told_at_warning_level_by_its_own_thread_and_stands_in_the_report(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("vllm.engine_loader.test")
    told = threading.Event()

    def tell(text: str) -> None:
        log.warning("start: %s", text)
        told.set()

    watchdog = Watchdog(watched.recorder, 0.05, tell)
    with watched.recorder.span(phases.DEVICE):
        watchdog.start()
        assert told.wait(30)
    watchdog.stop()
    (record_,) = [found for found in caplog.records if found.name == log.name]
    assert record_.levelno == logging.WARNING
    (stall,) = account_of(watched.directory).timeline.stalls
    assert stall.text.startswith("device has taken")


def test_a_function_of_an_engine_is_recorded_and_one_that_is_missing_is_passed_over(tmp_path: Path) -> None:
    class Runner:
        def capture_model(self, size: int) -> int:
            return size + 1

    record(Runner, "capture_model", phases.GRAPH_CAPTURE)
    record(Runner, "capture_model", phases.GRAPH_CAPTURE)
    record(Runner, "another", phases.GRAPH_CAPTURE)
    assert Runner().capture_model(1) == 2
    assert not hasattr(Runner, "another")
