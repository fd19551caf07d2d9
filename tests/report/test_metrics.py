"""Metrics of a start: values, Prometheus' text format, the engine's registry, and the dashboard that shows them."""

import json
import re
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine_loader.report import metrics
from engine_loader.report.metrics import METRICS, samples_of, set_gauges, text_of, write_textfile
from engine_loader.report.reading.timeline import read_timeline

from .made_starts import WALL, MadeStart, usual_start

ROOT = Path(__file__).resolve().parents[2]
USED_FUNCTIONS = {"quantile", "avg", "max", "count", "by", "phase", "time"}


def values(text: str) -> dict[tuple[str, str], float]:
    """(name, phase) -> value, as Prometheus reads it."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        assert family.documentation == METRICS[family.name]
        for sample in family.samples:
            found[sample.name, sample.labels.get("phase", "")] = sample.value
    return found


def test_the_metrics_of_a_start_are_what_its_report_says(tmp_path: Path) -> None:
    found = values(text_of(read_timeline(usual_start(tmp_path, cache="restored"))))
    assert found["engine_loader_start_seconds", ""] == 40
    assert found["engine_loader_start_ready_timestamp_seconds", ""] == pytest.approx(WALL + 40, abs=0.01)
    by_phase = {phase: value for (name, phase), value in found.items() if name.endswith("phase_seconds")}
    assert by_phase["compile"] == 20
    assert sum(by_phase.values()) == 40
    assert found["engine_loader_weights_source_wait_seconds", ""] == 3.6
    assert found["engine_loader_weights_loaded_bytes", ""] == 8e9
    assert found["engine_loader_compile_cache_restored", ""] == 1
    assert found["engine_loader_compile_cache_restore_seconds", ""] == 1


def test_every_metric_has_a_unit_that_prometheus_knows_or_counts_things() -> None:
    units = ("_seconds", "_bytes", "_stalls", "_reads", "_restored")
    assert [name for name in METRICS if not name.startswith("engine_loader_") or not name.endswith(units)] == []


def test_what_a_start_did_not_do_is_left_out(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    start.process("server", ("Python and imports", 0, 5), pid=1, parent=0, ready=5)
    names = {sample.name for sample in samples_of(read_timeline(start.directory))}
    assert not any("weights" in name or "compile_cache" in name for name in names)


def test_a_start_that_is_not_ready_has_no_metrics(tmp_path: Path) -> None:
    start = MadeStart(tmp_path)
    start.process("server", ("Python and imports", 0, 5), pid=1, parent=0)
    assert text_of(read_timeline(start.directory)) == ""


def test_a_textfile_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    timeline = read_timeline(usual_start(tmp_path / "starts"))
    for _ in range(2):
        write_textfile(tmp_path / "vllm.prom", timeline)
    assert (tmp_path / "vllm.prom").read_text() == text_of(timeline)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["starts", "vllm.prom"]


def test_the_engines_registry_has_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "_gauges", {})
    monkeypatch.setattr(
        sys.modules["prometheus_client"], "Gauge", lambda *args, **options: Gauge(*args, **options, registry=registry)
    )
    timeline = read_timeline(usual_start(tmp_path))
    assert set_gauges(timeline)
    assert set_gauges(timeline)  # a second engine of this process
    served = values(generate_latest(registry).decode())
    assert served == pytest.approx(values(text_of(timeline)), rel=1e-9)


def test_a_process_without_prometheus_client_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "prometheus_client")
    assert not set_gauges(read_timeline(usual_start(tmp_path)))
    assert "prometheus_client" not in sys.modules


def test_the_dashboard_shows_metrics_that_exist_and_all_of_them() -> None:
    dashboard = json.loads((ROOT / "configs" / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for text in expressions for name in re.findall(r"[a-z][a-z_]*", text)} - USED_FUNCTIONS
    assert names == set(METRICS)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_document_names_every_metric() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(\w+)", text, re.MULTILINE)) == set(METRICS)
