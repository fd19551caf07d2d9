"""Spans of OpenTelemetry: only where a tracer is configured, and with the times of the start."""

from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine_loader.report.reading.timeline import read_timeline
from engine_loader.report.spans import send_spans

from .made_starts import WALL, MadeStart, usual_start


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What a tracer of this process sends."""
    made = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return made


def test_a_start_is_one_trace_with_its_times(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    timeline = read_timeline(usual_start(tmp_path))
    assert send_spans(timeline) == len(exporter.get_finished_spans())
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert len({span.context.trace_id for span in exporter.get_finished_spans()}) == 1
    whole, worker, weights = spans["engine start"], spans["worker 0"], spans["weight reading"]
    assert (whole.start_time, whole.end_time) == (WALL * 1e9, (WALL + 40) * 1e9)
    assert whole.attributes["model"] == "llama"
    assert (worker.parent.span_id, weights.parent.span_id) == (whole.context.span_id, worker.context.span_id)
    assert (weights.start_time, weights.end_time) == ((WALL + 14) * 1e9, (WALL + 18) * 1e9)
    assert weights.attributes["bytes"] == 8_000_000_000
    assert weights.attributes["waited.source"] == 3.6


def test_without_a_provider_of_its_own_or_before_it_is_ready_nothing_is_sent(
    tmp_path: Path, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = MadeStart(tmp_path, "20261130T090000Z-1")
    start.process("worker", ("weights", 0, 1), pid=1, parent=0)
    assert send_spans(read_timeline(start.directory)) == 0
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    assert send_spans(read_timeline(usual_start(tmp_path))) == 0
    assert exporter.get_finished_spans() == ()
