"""`engine-loader report` on recorded starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.report.made_starts import usual_start

from .running import invoke

Report = Callable[..., Result]


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    """The directory of starts, with two of them: the later one compiles for 5 s longer."""
    usual_start(tmp_path / "starts", "20261130T070000Z-1")
    usual_start(tmp_path / "starts", "20261130T080000Z-1", compile_s=25)
    return tmp_path / "starts"


@pytest.fixture
def report(starts: Path) -> Report:
    """Runs `engine-loader report` with these starts."""
    return lambda *args: invoke("report", *args, env={"ENGINE_LOADER_REPORT__DIRECTORY": str(starts)})


def test_the_last_start_is_shown_with_its_waterfall_and_what_would_help(report: Report) -> None:
    said = report()
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()
    assert lines[0] == "vllm llama tp1_pp1_dp1 b10_3fs 20261130T080000Z-1: ready after 45.0 s"
    assert lines[2] == "API server (pid 1, one)"
    bars = {line[:40].rstrip(): line[50:] for line in lines if "━" in line or "─" in line}
    assert list(bars) == [
        "Python and imports",
        "configuration",
        "engine process",
        "server",
        "engine setup",
        "  worker processes",
        "cache restore",
        "model setup",
        "  model creation",
        "  weights",
        "    weight reading",
        "warm-up",
        "  compile",
    ]
    assert bars["engine process"].strip("─ ") == ""
    assert bars["  compile"] == " " * 24 + "━" * 33  # of 60 columns: from 18 to 43 of 45 s
    assert "compile                                    25.0 s   56%" in lines
    assert "100% of it is in known phases" in lines
    assert lines[lines.index("what would help most") + 1].startswith("- compile and warm-up 26.0 s")


def test_an_earlier_start_is_named_by_its_directory(starts: Path, report: Report) -> None:
    assert "ready after 40.0 s" in report(starts / "20261130T070000Z-1").stdout
    assert "ready after 40.0 s" in report("20261130T070000Z-1").stdout


def test_json_has_the_critical_path_and_the_advice(report: Report) -> None:
    found = json.loads(report("--json").stdout)
    assert found["ready_s"] == 45
    assert found["coverage"] == 1.0
    assert found["compile_cache"] == "nothing"
    assert found["seconds_by_phase"]["compile"] == 25
    assert {"process": "worker 0", "phase": "compile", "began_s": 18, "ended_s": 43} in found["critical_path"]
    assert found["advice"][0]["phase"] == "compile"


def test_a_trace_and_a_page_are_written(report: Report, tmp_path: Path) -> None:
    said = report("latest", "--trace", tmp_path / "t.json", "--html", tmp_path / "p.html")
    assert (said.exit_code, said.stdout) == (0, "")
    assert json.loads((tmp_path / "t.json").read_text())["otherData"]["start"] == "20261130T080000Z-1"
    assert "ready after 45.0 s" in (tmp_path / "p.html").read_text()


def test_a_slower_phase_is_named_and_is_an_exit_status(report: Report) -> None:
    slower = report("compare", "20261130T070000Z-1", "latest")
    assert slower.exit_code == 1
    rows = [line.split() for line in slower.stdout.splitlines()]
    assert [row for row in rows if row[-1] == "slower"] == [
        ["compile", "20.0", "s", "25.0", "s", "+5.0", "s", "slower"]
    ]
    assert report("compare", "20261130T070000Z-1", "latest", "--threshold", "0.5").exit_code == 0
    assert report("compare", "latest", "20261130T070000Z-1").exit_code == 0
    changes = json.loads(report("compare", "20261130T070000Z-1", "latest", "--json").stdout)["phases"]
    assert {change["phase"]: change["slower"] for change in changes}["compile"]


def test_starts_are_listed(report: Report) -> None:
    rows = [line.split() for line in report("list").stdout.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["20261130T070000Z-1", "40.0", "s"], ["20261130T080000Z-1", "45.0", "s"]]


def test_without_starts_it_says_when_one_is_recorded(tmp_path: Path) -> None:
    said = invoke("report", env={"ENGINE_LOADER_REPORT__DIRECTORY": str(tmp_path)})
    assert said.exit_code == 1
    assert "one is recorded whenever vLLM or SGLang starts" in said.stderr
