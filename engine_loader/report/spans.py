"""A start as spans of OpenTelemetry, where the process has a tracer that sends them somewhere."""

from __future__ import annotations

import sys
from typing import Any

from .reading.timeline import Phase, Process, Timeline

_TRACER = "engine_loader"


def send_spans(timeline: Timeline) -> int:
    """Send the phases of a start that became ready: one span for the start, below it one for each process and phase.

    Nothing is sent where this process has not imported OpenTelemetry, or has no provider of tracers of its own: without
    one its spans go nowhere.

    Returns:
        How many spans were made.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or timeline.ready is None or "sdk" not in type(trace.get_tracer_provider()).__module__:
        return 0
    tracer = trace.get_tracer(_TRACER)
    whole = tracer.start_span("engine start", start_time=_ns(timeline, 0.0), attributes=_flat(timeline.identity))
    made = 1
    below = trace.set_span_in_context(whole)
    for process in timeline.processes:
        span = tracer.start_span(process.title, below, start_time=_ns(timeline, process.began), attributes=_of(process))
        inside = trace.set_span_in_context(span)
        for phase in process.phases:
            one = tracer.start_span(
                phase.name, inside, start_time=_ns(timeline, phase.began), attributes=_of_phase(phase)
            )
            one.end(_ns(timeline, timeline.end_of(process, phase)))
        span.end(_ns(timeline, max(process.last, process.began)))
        made += 1 + len(process.phases)
    whole.end(_ns(timeline, timeline.ready))
    return made


def _ns(timeline: Timeline, seconds: float) -> int:
    return round((timeline.began_wall + seconds) * 1e9)


def _of(process: Process) -> dict[str, Any]:
    rank = {} if process.rank is None else {"rank": process.rank}
    return {"process.pid": process.pid, "host.name": process.node, **rank}


def _of_phase(phase: Phase) -> dict[str, Any]:
    return {"beside": phase.beside, "waits": phase.waits, **_flat(phase.details)}


def _flat(details: dict[str, Any]) -> dict[str, Any]:
    """What attributes can hold: numbers, texts and truth values."""
    found: dict[str, Any] = {}
    for name, value in details.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": each for inner, each in _flat(value).items()}
        elif isinstance(value, str | bool | int | float):
            found[name] = value
    return found
