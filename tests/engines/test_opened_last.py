"""What a start opened is kept for `engine-loader warm`, by each of its processes and for each environment."""

import logging
import os
import threading
from pathlib import Path

import pytest

from engine_loader.engines.common.start import opened_last, phase_wrappers, start_account
from engine_loader.engines.common.start.opened_last import keep_opened, opened_in_words
from engine_loader.report.events import recorder
from engine_loader.start.opened_files import list_name, noted, read_list, write_list
from engine_loader.start.page_reading import Budget, WarmingEach
from tests.report.made_starts import MadeStart


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of starts; vLLM 0.32 is installed."""
    monkeypatch.setenv("ENGINE_LOADER_REPORT__DIRECTORY", str(tmp_path))
    monkeypatch.setattr(opened_last, "module_version", {"vllm": "0.32", "sglang": "none"}.__getitem__)
    monkeypatch.setattr(opened_last, "opened_here", lambda: ["/first/a.so", "/first/b.pyc"])
    return tmp_path


def test_what_all_processes_opened_is_kept_when_the_start_is_ready(starts: Path) -> None:
    start = starts / "20261130T080000Z-1"
    start.mkdir()
    write_list(start / "opened-7.json", ["/engine/c.so", "/first/a.so"])
    keep_opened(start, "vllm")
    assert opened_last.opened_last() == ["/first/a.so", "/first/b.pyc", "/engine/c.so"]
    assert list(start.iterdir()) == []


def test_another_version_has_another_list(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (starts / "20261130T080000Z-1").mkdir()
    keep_opened(starts / "20261130T080000Z-1", "vllm")
    monkeypatch.setattr(opened_last, "module_version", {"vllm": "0.33", "sglang": "none"}.__getitem__)
    assert opened_last.opened_last() == []


def test_lists_of_environments_that_are_gone_are_deleted(starts: Path) -> None:
    (starts / "20261130T080000Z-1").mkdir()
    for number in range(20):
        write_list(starts / f"opened-vllm-{number}.json", ["/a.so"])
        os.utime(starts / f"opened-vllm-{number}.json", (number, number))
    keep_opened(starts / "20261130T080000Z-1", "vllm")
    left = {path.name for path in starts.glob("opened-*.json")}
    assert left == {list_name("vllm", "0.32"), *(f"opened-vllm-{number}.json" for number in range(13, 20))}


def test_without_a_home_or_a_list_there_is_nothing(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened_last.opened_last() == []
    monkeypatch.setenv("ENGINE_LOADER_REPORT__DIRECTORY", "~nobody-of-this-name/starts")
    assert opened_last.opened_last() == []


def threads_that(action: object) -> None:
    """Call ``action``, and wait for the threads that it starts."""
    before = set(threading.enumerate())
    assert callable(action)
    action()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)


def test_an_engine_s_process_leaves_its_list_in_the_start(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_directory", None)
    threads_that(phase_wrappers.note_files)
    assert list(starts.iterdir()) == []
    monkeypatch.setattr(recorder, "_directory", str(starts))
    threads_that(phase_wrappers.note_files)
    assert noted(starts)
    monkeypatch.setattr(recorder, "_directory", str(starts / "missing"))
    threads_that(phase_wrappers.note_files)  # a disk that is full: nothing is said


def test_a_worker_leaves_its_list_when_it_has_warmed_up(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        def compile_or_warm_up_model(self, seconds: float) -> float:
            assert list(starts.iterdir()) == []
            return seconds

    monkeypatch.setattr(recorder, "_directory", str(starts))
    worker = Worker()
    phase_wrappers.note_files_behind(worker, "compile_or_warm_up_model")
    phase_wrappers.note_files_behind(worker, "missing")
    threads_that(lambda: worker.compile_or_warm_up_model(1.5))
    assert [path.name for path in starts.iterdir()] == [f"opened-{os.getpid()}.json"]


def test_the_account_of_a_start_ends_with_its_list(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeStart(starts)
    made.process("server", ("server", 0, 1), pid=1, ready=1.0)
    identity = start_account.identity_of("vllm", "/models/llama", "b10_3fs", {"tp": 1})
    start_account._sum_up(made.directory, identity, 1.0, logging.getLogger("engine_loader.tests"))
    assert read_list(starts / list_name("vllm", "0.32")) == ["/first/a.so", "/first/b.pyc"]


def test_what_became_of_them_is_said_in_words() -> None:
    done = WarmingEach([], Budget())
    done.files, done.read, done.seconds = 1234, 3 << 20, 2.0
    said = "1,234 .so and .pyc files of the last start: 3.00 MiB into the page cache in 2.0 s"
    assert opened_in_words(done) == said
    done.resident = 1 << 20
    assert opened_in_words(done) == f"{said}, 1.00 MiB were there already"
    done.reason = "there is no room for more"
    assert opened_in_words(done) == f"{said}, 1.00 MiB were there already; the rest was left: there is no room for more"
