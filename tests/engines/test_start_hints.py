"""What the log offers at a start, and what ``start.plan: on`` does."""

import logging
import os
from pathlib import Path

import pytest

from engine_loader.engines.common.start import start_hints
from engine_loader.engines.common.start.start_hints import PLAN_VARIABLE, keep_plan, plan_hint, tell_bytecode
from engine_loader.engines.starting.vllm_processes import why_not
from engine_loader.report.phases import GRAPH_ESTIMATE, WARM_UP
from engine_loader.report.reading.timeline import Timeline, read_timeline
from tests.report.made_starts import MadeStart

SETTING = "ENGINE_LOADER_START__PLAN"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, "")  # so that it is taken away again
    monkeypatch.delenv(PLAN_VARIABLE)


@pytest.mark.parametrize(("setting", "value"), [("on", "1"), ("auto", None), ("off", None)])
def test_only_on_has_vllm_keep_its_plan(monkeypatch: pytest.MonkeyPatch, setting: str, value: str | None) -> None:
    monkeypatch.setenv(SETTING, setting)
    assert keep_plan(True) is None
    assert os.environ.get(PLAN_VARIABLE) == value


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "on")
    monkeypatch.setenv(PLAN_VARIABLE, "0")
    assert keep_plan(True) is None
    assert os.environ[PLAN_VARIABLE] == "0"


def test_a_version_without_plans_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "on")
    assert keep_plan(False) == "start.plan: this version of vLLM has no startup plans"
    assert PLAN_VARIABLE not in os.environ


def test_the_variable_does_not_keep_processes_from_being_forked() -> None:
    assert why_not({}, {PLAN_VARIABLE: "1"}) is None


def start_with(directory: Path, seconds: float) -> Timeline:
    made = MadeStart(directory)
    made.process("API server", pid=1, ready=40.0)
    for rank in (0, 1):
        spans = (WARM_UP, 10.0, 20.0 + seconds), (GRAPH_ESTIMATE, 20.0, 20.0 + seconds)
        made.process("worker", *spans, pid=2 + rank, parent=1, began=5.0, rank=rank)
    return read_timeline(made.directory)


def test_the_log_says_where_a_plan_would_help(tmp_path: Path) -> None:
    assert plan_hint(start_with(tmp_path, 4.0)) == (
        "start.plan: 4.0 s went to the estimate of the memory of CUDA graphs; with start.plan: on, vLLM keeps the size "
        "of the KV cache, and later starts of the same kind leave that out"
    )


def test_nothing_is_said_where_it_would_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_hint(start_with(tmp_path / "short", 0.2)) is None
    long = start_with(tmp_path / "long", 4.0)
    monkeypatch.setenv(SETTING, "off")
    assert plan_hint(long) is None
    monkeypatch.delenv(SETTING)
    monkeypatch.setenv(PLAN_VARIABLE, "1")
    assert plan_hint(long) is None


def test_modules_that_are_compiled_in_every_start_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(start_hints, "why_not_kept", lambda module: f"/opt/{module} cannot be written")
    tell_bytecode("vllm", logging.getLogger("engine_loader.tests"))
    assert caplog.messages == [
        "start: Python compiles vllm's modules in every start, for /opt/vllm cannot be written: set "
        "PYTHONPYCACHEPREFIX to a directory that can be written and outlives the start"
    ]


def test_nothing_is_said_where_they_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tell_bytecode("engine_loader", logging.getLogger("engine_loader.tests"))
    assert caplog.messages == []
