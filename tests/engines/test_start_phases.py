"""The account of a start as engines' processes make it: when it begins, what it predicts, when it ends."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_loader.engines.common.start import phase_wrappers, start_account
from engine_loader.report.events import START, Recorder
from engine_loader.report.reading.timeline import read_timeline
from engine_loader.report.starts import Summary, identity_of, read_summaries, starts_in, write_summary
from tests.report.made_starts import usual_start

LOG = logging.getLogger("vllm.engine_loader")
SIZES = {"tp": 2, "pp": 1, "dp": 1}


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of starts of a process that has not begun any."""
    monkeypatch.setenv("ENGINE_LOADER_REPORT__DIRECTORY", str(tmp_path))
    monkeypatch.setenv(START, "")
    recorder = Recorder()
    recorder.note_process()
    for module in ("engines.common.start.phase_wrappers", "engines.common.start.start_account", "report.starts"):
        monkeypatch.setattr(f"engine_loader.{module}.recorder", recorder)
    monkeypatch.setattr(start_account, "_start", start_account._Start())
    phase_wrappers.watchdogs.clear()
    yield tmp_path
    for watchdog in phase_wrappers.watchdogs:
        watchdog.stop()
    phase_wrappers.watchdogs.clear()
    recorder.switch_off()


def begin() -> None:
    start_account.begin("vllm", "/models/llama", "b10_3fs", SIZES, LOG)


def ready() -> None:
    """Returns when what is made of the events has been made."""
    start_account.ready(LOG)
    for thread in threading.enumerate():
        if thread.name == "start-report":
            thread.join()


def earlier(starts: Path, *seconds: float, model: str = "/models/llama") -> None:
    identity = identity_of("vllm", model, "b10_3fs", SIZES)
    for number, each in enumerate(seconds):
        write_summary(usual_start(starts, f"202501{number + 10}T000000Z-{len(model)}"), Summary(each, 0.0, identity))


def test_the_first_start_of_its_kind_predicts_nothing(starts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOG.name)
    earlier(starts, 30.0, model="/models/another")
    begin()
    assert "expected ready" not in caplog.text


def test_earlier_starts_of_its_kind_tell_when_it_will_be_ready(starts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOG.name)
    earlier(starts, 300.0, 41.0, 35.0, 38.0, 38.4, 36.0)
    begin()
    assert caplog.messages == ["expected ready in 38 s (last 5: 35-41 s)"]


def test_one_earlier_start_is_no_range(starts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOG.name)
    earlier(starts, 35.0)
    begin()
    assert caplog.messages == ["expected ready in 35 s (last 1: 35 s)"]


def test_a_start_that_became_ready_is_summed_up_once(starts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOG.name)
    begin()
    ready()
    ready()
    (directory,) = starts_in(starts)
    (summary,) = read_summaries(starts)
    timeline = read_timeline(directory)
    assert timeline.ready == pytest.approx(summary.seconds, abs=0.5)
    assert timeline.identity["layout"] == "tp2_pp1_dp1"
    assert [message for message in caplog.messages if message.startswith("ready in")] == [
        f"ready in {summary.seconds:.1f} s; `engine-loader report` says where the time went"
    ]


def test_a_second_engine_of_a_process_is_a_start_of_its_own(starts: Path) -> None:
    begin()
    ready()
    first = read_timeline(starts_in(starts)[0])
    (starts / starts_in(starts)[0].name).rename(starts / "20250101T000000Z-1")
    begin()
    ready()
    second = read_timeline(starts_in(starts)[-1])
    assert first.ready is not None
    assert second.ready is not None
    assert second.ready < first.ready  # counted from its own beginning, not from the process's
    assert len(read_summaries(starts)) == 2


def test_bad_settings_are_left_to_those_who_need_them(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_LOADER_REPORT__KEEP_STARTS", "none")
    begin()
    ready()
    assert starts_in(starts) == []


def test_switched_off_no_start_is_recorded(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_LOADER_REPORT__EVENTS", "false")
    begin()
    ready()
    assert list(starts.iterdir()) == []
    assert read_summaries(starts) == []
