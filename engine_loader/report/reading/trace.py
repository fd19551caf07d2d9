"""A timeline in the trace event format, which Perfetto (https://ui.perfetto.dev) and chrome://tracing read."""

from __future__ import annotations

from typing import Any

from .timeline import Timeline


def trace_of(timeline: Timeline) -> dict[str, Any]:
    """The start as an object for a JSON file; times are microseconds since the start began."""
    events: list[dict[str, Any]] = []
    for number, process in enumerate(timeline.processes, 1):
        title = f"{process.title} (pid {process.pid} on {process.node})"
        events.append({"ph": "M", "pid": number, "tid": 0, "name": "process_name", "args": {"name": title}})
        events.append(
            {"ph": "M", "pid": number, "tid": 0, "name": "process_sort_index", "args": {"sort_index": number}}
        )
        for phase in process.phases:
            ended = timeline.end_of(process, phase)
            events.append(
                {
                    "ph": "X",
                    "pid": number,
                    "tid": phase.thread,
                    "name": phase.name,
                    "cat": "wait" if phase.waits else "beside" if phase.beside else "phase",
                    "ts": round(phase.began * 1e6),
                    "dur": round((ended - phase.began) * 1e6),
                    "args": phase.details,
                }
            )
    if timeline.ready is not None:
        events.append({"ph": "i", "pid": 1, "tid": 0, "name": "ready", "ts": round(timeline.ready * 1e6), "s": "g"})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"start": timeline.name, **timeline.identity}}
