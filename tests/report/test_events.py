"""Events of a start: what a process writes, and that nothing about them can hold up or break an engine."""

import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_loader.report import events
from engine_loader.report.events import MOST_BYTES, OFF, START, Recorder, process_began
from engine_loader.report.starts import begin_start, identity_of, starts_in
from engine_loader.settings import ReportSettings


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """One that writes to ``tmp_path``."""
    monkeypatch.setenv(START, str(tmp_path))
    made = Recorder()
    made.note_process("worker")
    yield made
    made.switch_off()


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]


def phases(directory: Path) -> list[tuple[str, str]]:
    found = lines(directory)
    names = {line["id"]: line["phase"] for line in found if line["event"] == "begin"}
    return [
        (line["event"], names.get(line.get("id"), line.get("phase")))
        for line in found
        if line["event"] in ("begin", "end", "point")
    ]


def run(code: str, **environ: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )
    return done.stdout.strip()


def test_a_phase_is_written_with_both_clocks_its_process_and_its_rank(recorder: Recorder, tmp_path: Path) -> None:
    recorder.name_process("worker", 3)
    before = time.monotonic(), time.time()
    with recorder.span("weights", files=2) as details:
        details["bytes"] = 10
    begin, end = [line for line in lines(tmp_path) if line["event"] in ("begin", "end")]
    assert (begin["phase"], begin["rank"], begin["pid"], begin["details"]) == ("weights", 3, os.getpid(), {"files": 2})
    assert end["details"] == {"files": 2, "bytes": 10}
    assert before[0] <= begin["mono"] <= end["mono"] <= time.monotonic()
    assert abs(begin["wall"] - before[1]) < 60
    assert lines(tmp_path)[0]["node"] == os.uname().nodename


def test_a_phase_that_fails_ends_with_what_began_within_it(recorder: Recorder, tmp_path: Path) -> None:
    def fail() -> None:
        with recorder.span("weights"):
            recorder.begin("weight reading")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert recorder.open == {}
    assert phases(tmp_path) == [("begin", "weights"), ("begin", "weight reading"), ("end", "weights")]


def test_what_was_recorded_before_a_start_was_known_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(START, raising=False)
    recorder = Recorder()
    recorder.note_process()
    recorder.past_span("Python and imports", process_began(), time.monotonic())
    assert lines(tmp_path) == []
    recorder.write_to(str(tmp_path))
    assert phases(tmp_path) == [("begin", "Python and imports"), ("end", "Python and imports")]
    assert os.environ[START] == str(tmp_path)
    recorder.switch_off()


def test_a_process_that_the_plugin_does_not_know_records_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    with recorder.span("weights") as details:
        details["bytes"] = 1
    assert not recorder.told_ready()
    assert lines(tmp_path) == []


def test_the_time_of_exec_is_that_of_the_kernel() -> None:
    said = run("""
        import time
        from engine_loader.report.events import process_began
        print(time.monotonic() - process_began())
    """)
    assert 0 < float(said) < 60
    assert process_began() < time.monotonic() - float(said)  # this process is older than the one that it started


def test_a_child_process_writes_a_file_of_its_own(recorder: Recorder, tmp_path: Path) -> None:
    run("from engine_loader.plugin import register; register()", **{START: str(tmp_path)})
    recorder.point("here")
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    child = next(line for line in lines(tmp_path) if line["event"] == "process" and line["pid"] != os.getpid())
    assert child["ppid"] == os.getpid()
    assert child["began"] < child["mono"]


def test_a_forked_process_writes_a_file_of_its_own_though_another_thread_was_writing(tmp_path: Path) -> None:
    said = run(
        """
        import os, threading
        from engine_loader.report.events import recorder
        recorder.note_process()
        with recorder.span("server"), recorder._lock:
            pid = os.fork()
            if not pid:
                recorder.point("in the child")
                os._exit(0)
        os.waitpid(pid, 0)
        print(pid)
        """,
        **{START: str(tmp_path)},
    )
    (child,) = tmp_path.glob(f"*-{said}-*.jsonl")
    assert [line["event"] for line in map(json.loads, child.read_text().splitlines())] == ["file", "process", "point"]


def test_events_of_several_threads_are_whole_lines(recorder: Recorder, tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(50):
            with recorder.span("compile"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(phases(tmp_path)) == 400
    assert len({line["id"] for line in lines(tmp_path) if line["event"] == "begin"}) == 200


def test_a_process_writes_no_more_than_it_may(recorder: Recorder, tmp_path: Path) -> None:
    while recorder._written <= MOST_BYTES:
        recorder.point("again", text="x" * 1000)
    recorder.point("never written")
    assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) < MOST_BYTES + 4096
    assert lines(tmp_path)[-1]["event"] == "cut"


def test_a_full_disk_is_told_once_and_nothing_is_raised(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(*_: object) -> int:
        raise OSError(28, "No space left on device")

    caplog.set_level("DEBUG", "engine_loader.report.events")
    with monkeypatch.context() as patch:
        patch.setattr(events.os, "write", write)
        for _ in range(3):
            with recorder.span("weights"):
                pass
    (said,) = caplog.messages
    assert "No space left" in said


def test_the_directory_of_a_start_is_removed_while_it_is_written_to(recorder: Recorder, tmp_path: Path) -> None:
    recorder._directory = str(tmp_path / "gone")
    with recorder.span("weights"):
        pass
    assert recorder.open == {}


IDENTITY = identity_of("vllm", "/secret/place/llama", "b10_3fs", {"tp": 2})


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """In the place of the process's own recorder."""
    monkeypatch.setenv(START, "")
    made = Recorder()
    monkeypatch.setattr("engine_loader.report.starts.recorder", made)
    yield made
    made.switch_off()


def test_a_start_has_a_directory_that_only_its_user_reads(tmp_path: Path, fresh: Recorder) -> None:
    directory = begin_start(ReportSettings(directory=str(tmp_path / "cache" / "starts")), IDENTITY)
    assert directory is not None
    assert directory.parent == tmp_path / "cache" / "starts"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (directory, directory.parent)] == [0o700, 0o700]
    (point,) = [line for line in lines(directory) if line.get("phase") == "start"]
    assert point["details"]["model"] == "llama"
    assert "secret" not in json.dumps(lines(directory))


def test_a_process_of_a_start_begins_no_other(tmp_path: Path, fresh: Recorder) -> None:
    settings = ReportSettings(directory=str(tmp_path))
    assert begin_start(settings, IDENTITY) is not None
    assert begin_start(settings, IDENTITY) is None
    assert len(starts_in(tmp_path)) == 1


def test_only_the_last_starts_are_kept(tmp_path: Path, fresh: Recorder) -> None:
    for number in range(14):
        old = tmp_path / f"20250101T0000{number:02}Z-1"
        old.mkdir()
        os.utime(old, (0, 0))
    (tmp_path / "another-directory").mkdir()
    directory = begin_start(ReportSettings(directory=str(tmp_path)), IDENTITY)
    kept = starts_in(tmp_path)
    assert len(kept) == 10
    assert kept[-1] == directory
    assert kept[0].name == "20250101T000005Z-1"
    assert (tmp_path / "another-directory").exists()


def test_starts_of_the_last_minutes_are_left_alone(tmp_path: Path, fresh: Recorder) -> None:
    for number in range(12):
        (tmp_path / f"20250101T0000{number:02}Z-1").mkdir()
    begin_start(ReportSettings(directory=str(tmp_path)), IDENTITY)
    assert len(starts_in(tmp_path)) == 13


def test_switched_off_nothing_is_written_by_this_process_or_its_children(tmp_path: Path, fresh: Recorder) -> None:
    fresh.note_process()
    assert begin_start(ReportSettings(events=False, directory=str(tmp_path)), IDENTITY) is None
    with fresh.span("weights"):
        pass
    assert os.environ[START] == OFF
    assert list(tmp_path.iterdir()) == []
    child = Recorder()
    child.note_process()
    assert child.directory is None
    assert not child.knows_process


@pytest.mark.parametrize("directory", ["/proc/nowhere", "/dev/null/starts", "~nobody-of-this-name/starts"])
def test_a_start_goes_on_where_nothing_can_be_written(directory: str, fresh: Recorder) -> None:
    fresh.note_process()
    assert begin_start(ReportSettings(directory=directory), IDENTITY) is None
    with fresh.span("weights"):
        pass
    assert fresh.directory is None
