"""What is read from the events of a start: on what the time depended, what would help, and how two starts differ."""

import json
import re
from pathlib import Path

import pytest

from engine_loader.report.reading.account import account_of
from engine_loader.report.reading.comparison import compare
from engine_loader.report.reading.critical_path import coverage, critical_path, seconds_by_phase
from engine_loader.report.reading.page import page_of
from engine_loader.report.reading.rows import rows_of
from engine_loader.report.reading.timeline import read_timeline
from engine_loader.report.reading.trace import trace_of
from engine_loader.report.starts import ReportError, Summary, find_start, identity_of, read_summaries, write_summary
from tests.support.html_page import Page

from .made_starts import MadeStart, usual_start


def test_the_time_to_ready_is_that_of_the_process_that_others_wait_for(tmp_path: Path) -> None:
    path = critical_path(read_timeline(usual_start(tmp_path)))
    assert [(s.process.role if s.process else None, s.name, s.began, s.ended) for s in path] == [
        ("API server", "Python and imports", 0, 4),
        ("API server", "configuration", 4, 5),
        ("engine core", "Python and imports", 5, 9),
        ("worker", "Python and imports", 9, 13),
        ("worker", "model creation", 13, 14),
        ("worker", "weight reading", 14, 18),
        ("worker", "compile", 18, 38),
        ("worker", "warm-up", 38, 39),
        ("API server", "server", 39, 40),
    ]
    assert coverage(path) == 1.0
    assert seconds_by_phase(path)["Python and imports"] == 12


def test_of_several_ranks_the_slowest_counts(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    start.process("engine core", ("worker processes", 0, 30, {"waits": True}), pid=1, parent=0, ready=30)
    start.process("worker", ("weight reading", 0, 10), ("warm-up", 10, 12), pid=2, rank=0)
    start.process("worker", ("weight reading", 0, 29), ("warm-up", 29, 30), pid=3, rank=1)
    path = critical_path(read_timeline(start.directory))
    assert [(s.process.title, s.name, s.seconds) for s in path if s.process] == [
        ("worker 1", "weight reading", 29),
        ("worker 1", "warm-up", 1),
    ]


def test_time_in_no_phase_is_not_counted_as_known(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    start.process("API server", ("Python and imports", 0, 5), pid=1, parent=0, ready=20)
    path = critical_path(read_timeline(start.directory))
    assert coverage(path) == 0.25
    assert seconds_by_phase(path) == {"": 15, "Python and imports": 5}


def test_a_wait_of_the_last_process_counts_as_unknown(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    spans = (("Python and imports", 0, 5), ("engine process", 5, 20, {"waits": True}))
    start.process("API server", *spans, pid=1, parent=0, ready=20)
    assert coverage(critical_path(read_timeline(start.directory))) == 0.25


def test_a_node_with_another_clock_is_placed_by_the_wall_clock(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    start.process("engine core", ("engine setup", 0, 10), pid=1, parent=0, ready=10)
    start.process("worker", ("weights", 2, 9), pid=1, rank=1, node="two", clock=77.0)
    (weights,) = read_timeline(start.directory).phases("weights")
    assert (weights[1].began, weights[1].ended) == (2, 9)


def test_damaged_lines_and_foreign_files_are_passed_over(tmp_path: Path) -> None:
    directory = usual_start(tmp_path)
    whole = read_timeline(directory)
    (path,) = directory.glob("*-3-0.jsonl")
    path.write_bytes(b'{"v":1\n[1,2]\nnull\n\xff\xfe\n{"event":"begin"}\n' + path.read_bytes() + b'{"event": "be')
    (directory / "notes.txt").write_text("not events")
    (directory / "empty.jsonl").touch()
    assert read_timeline(directory).processes == whole.processes


def test_a_start_that_did_not_become_ready_ends_with_its_last_event(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    start.process("API server", ("Python and imports", 0, 5), ("configuration", 5, None), pid=1, parent=0)
    start.process("worker", ("weights", 6, 90), pid=2, began=6)
    timeline = read_timeline(start.directory)
    assert timeline.ready is None
    assert timeline.end == 90
    assert critical_path(timeline)[-1].name == "weights"


def test_a_process_that_was_killed_does_not_count_for_ever(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    start.process("API server", ("server", 0, 20), pid=1, parent=0, ready=20)
    start.process("process", ("Python and imports", 2, 4), ("model inspection", 4, None), pid=2, began=2)
    assert seconds_by_phase(critical_path(read_timeline(start.directory))) == {"server": 18, "Python and imports": 2}


def test_an_empty_directory_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no events"):
        read_timeline(tmp_path)


def texts(directory: Path) -> list[str]:
    return [one.text for one in account_of(directory).advice]


def test_words_name_what_would_help_most_first(tmp_path: Path) -> None:
    compiling, imports, weights = texts(usual_start(tmp_path))
    assert compiling == (
        "compile and warm-up 21.0 s: the compile cache had nothing for it yet; the next start of this kind is shorter "
        "where its cache is restored"
    )
    assert imports.startswith("Python and imports 12.0 s in 3 processes")
    assert weights == (
        "weights 4.0 s: 7.45 GiB at 2.00 GB/s from posix, 90% of it waiting for the source: `engine-loader bench read` "
        "shows its limit here"
    )


def test_an_earlier_start_tells_what_a_restored_cache_saves(tmp_path: Path) -> None:
    usual_start(tmp_path, "20261130T070000Z-1", compile_s=2, cache="restored")
    usual_start(tmp_path, "20261130T071000Z-1", compile_s=1, cache="nothing")
    cold = usual_start(tmp_path, "20261130T080000Z-1")
    assert texts(cold)[0].endswith("a restored one would have saved about 18 s, as in an earlier start")


EXPLAIN = "`engine-loader compile-cache explain` says"


@pytest.mark.parametrize(
    ("status", "verdict", "said"),
    [
        ("restored", "hit", "the compile cache was restored, and nothing was compiled anew (hit)"),
        (
            "restored",
            "partial",
            f"the compile cache was restored, and some was compiled anew beside what it has (partial); {EXPLAIN} what",
        ),
        (
            "complete",
            "partial",
            "what the compile cache has was in place already, and some was compiled anew beside what it has (partial); "
            f"{EXPLAIN} what",
        ),
        ("restored", "miss", f"the compile cache was restored, and did not serve (miss); {EXPLAIN} why"),
        (
            "complete",
            "refused",
            "what the compile cache has was in place already, and a local cache was left alone (refused); "
            f"{EXPLAIN} which",
        ),
        (
            "restored",
            None,
            f"the compile cache was restored, and no verdict is known; {EXPLAIN} whether all that it holds was used",
        ),
        ("failed", "hit", "the restore of the compile cache failed, and nothing was compiled anew (hit)"),
    ],
)
def test_what_a_cache_was_good_for_is_told_by_the_verdict(
    tmp_path: Path, status: str, verdict: str | None, said: str
) -> None:
    found = texts(usual_start(tmp_path, cache=status, verdict=verdict))
    assert [text for text in found if text.startswith("compile")] == [f"compile and warm-up 21.0 s: {said}"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("refused", "what the compile cache has was not taken (refused)"),
        ("interrupted", "the restore of the compile cache was given up (interrupted)"),
        ("failed", "the restore of the compile cache failed"),
        ("", "no compile cache was restored (compile_cache.enabled)"),
    ],
)
def test_a_cache_that_did_not_come_is_told_by_the_status(tmp_path: Path, status: str, said: str) -> None:
    found = texts(usual_start(tmp_path, cache=status, verdict="miss"))
    rest = "the next start of this kind is shorter where its cache is restored"
    assert found[0] == f"compile and warm-up 21.0 s: {said}; {rest}"


def test_a_restored_cache_that_did_not_serve_is_no_example_of_what_one_saves(tmp_path: Path) -> None:
    usual_start(tmp_path, "20261130T070000Z-1", compile_s=2, cache="restored", verdict="miss")
    assert texts(usual_start(tmp_path))[0].endswith("shorter where its cache is restored")


def test_of_several_nodes_the_worst_verdict_counts(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    for pid, verdict in enumerate(("hit", "partial", "hit"), 1):
        start.process("server", ("cache save", 1, 2, {"details": {"verdict": verdict}}), pid=pid, ready=1.0)
    account = account_of(start.directory).to_json()
    assert (account["compile_cache"], account["compile_cache_verdict"]) == ("", "partial")


def test_phases_of_one_name_are_one_row(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    spans = [("warm-up", 0.0, 9.0), *(("compile", float(second), second + 0.5) for second in range(1, 8))]
    start.process("worker", *spans, pid=1, parent=0, ready=10)
    timeline = read_timeline(start.directory)
    warm_up, compiling = rows_of(timeline, timeline.processes[0])
    assert (warm_up.title, warm_up.depth, warm_up.seconds) == ("warm-up", 0, 9.0)
    assert (compiling.title, compiling.depth, compiling.seconds) == ("compile (7 times)", 1, 3.5)


def test_a_slowdown_of_a_fifth_in_one_phase_is_found_and_named(tmp_path: Path) -> None:
    before, after = usual_start(tmp_path, "20261130T070000Z-1"), usual_start(tmp_path, compile_s=24.5)
    found = compare(*(critical_path(read_timeline(directory)) for directory in (before, after)))
    assert [change.phase for change in found.slower(0.2)] == ["compile"]
    assert found.whole.difference == 4.5
    assert found.slower(0.3) == []


def test_a_trifle_is_no_slowdown(tmp_path: Path) -> None:
    before, after = usual_start(tmp_path, "20261130T070000Z-1", compile_s=0.1), usual_start(tmp_path, compile_s=0.25)
    found = compare(*(critical_path(read_timeline(directory)) for directory in (before, after)))
    assert found.slower(0.2) == []


def test_a_trace_has_every_phase_of_every_process(tmp_path: Path) -> None:
    timeline = read_timeline(usual_start(tmp_path))
    trace = json.loads(json.dumps(trace_of(timeline)))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == sum(len(process.phases) for process in timeline.processes)
    (compiling,) = [event for event in spans if event["name"] == "compile"]
    assert (compiling["ts"], compiling["dur"]) == (18_000_000, 20_000_000)
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert names == ["API server (pid 1 on one)", "engine core (pid 2 on one)", "worker 0 (pid 3 on one)"]


def test_the_page_is_whole_loads_nothing_and_says_what_the_terminal_says(tmp_path: Path) -> None:
    account = account_of(usual_start(tmp_path))
    text = page_of(account)
    page = Page(text)
    assert (page.open, page.wrong, page.loads) == ([], [], [])
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for words in ("ready after 40.0 s", "worker 0", "compile", "20.00 s", account.advice[0].text):
        assert words in page.text


def test_what_a_model_is_called_cannot_become_a_part_of_the_page(tmp_path: Path) -> None:
    start = MadeStart(tmp_path, model="<script>alert(1)</script>")
    start.process("API server", ('"><img src=x>', 0, 5), pid=1, parent=0, ready=5)
    assert Page(page_of(account_of(start.directory))).loads == []


def test_a_start_is_found_by_latest_by_its_name_and_by_its_path(tmp_path: Path) -> None:
    first, last = usual_start(tmp_path, "20261130T070000Z-9"), usual_start(tmp_path, "20261130T080000Z-1")
    assert find_start("latest", tmp_path) == last
    assert find_start(first.name, tmp_path) == first
    assert find_start(str(first), tmp_path / "elsewhere") == first
    with pytest.raises(ReportError, match=first.name):
        find_start("20200101T000000Z-1", tmp_path)
    with pytest.raises(ReportError, match="no start in"):
        find_start("latest", tmp_path / "elsewhere")


def test_summaries_of_starts_that_became_ready_are_read_in_their_order(tmp_path: Path) -> None:
    identity = identity_of("vllm", "s3://key:secret@bucket/models/llama?signature=x", "b10_3fs", {"tp": 2, "pp": 1})
    assert (identity.model, identity.layout) == ("llama", "tp2_pp1")
    for number, seconds in enumerate((30.0, 20.0)):
        write_summary(usual_start(tmp_path, f"2026113{number}T080000Z-1"), Summary(seconds, 5.0, identity))
    usual_start(tmp_path, "20261139T080000Z-1")
    (usual_start(tmp_path, "20261138T080000Z-1") / "summary.json").write_text("{")
    assert [summary.seconds for summary in read_summaries(tmp_path)] == [30.0, 20.0]
