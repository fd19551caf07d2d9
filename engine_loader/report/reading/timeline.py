"""The events of a start as processes with their phases, on one clock.

Processes of one machine share the monotonic clock; those of other machines are placed by the wall clock. Lines that are
cut or damaged, as a process leaves them that was killed while it wrote, are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..phases import READY, STALL
from ..starts import SUMMARY, ReportError


@dataclass
class Phase:
    """One phase of one process; times are seconds since the start began.

    Attributes:
        name: as in phases.py.
        began: when it began.
        ended: when it ended; None: it had not ended when the last event was written.
        thread: native id of its thread.
        beside: the start did not wait for it.
        waits: the process only waited for others.
        details: what was noted with it.
    """

    name: str
    began: float
    ended: float | None
    thread: int
    beside: bool = False
    waits: bool = False
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Process:
    """A process of a start; times are seconds since the start began.

    Attributes:
        node: its machine's name.
        pid, parent: its number there, and that of the process that made it.
        role: what it is, e.g. "worker"; "process" where that is not known.
        rank: in its engine; None where it has none.
        began: when it was made.
        last: when it wrote its last event.
        phases: in the order in which they began.
        level: 0 for the first process, 1 for those that it started, …
        cut: whether it had more events than are written.
    """

    node: str
    pid: int
    parent: int
    role: str
    rank: int | None
    began: float
    last: float
    phases: list[Phase]
    level: int = 0
    cut: bool = False

    @property
    def title(self) -> str:
        """Its role and rank."""
        return f"{self.role} {self.rank}" if self.rank is not None else self.role


@dataclass(frozen=True)
class ToldStall:
    """A stall that the watchdog of a process told of, ``at`` seconds after the start began."""

    process: Process
    at: float
    text: str


@dataclass
class Timeline:
    """A start.

    Attributes:
        name: of its directory.
        began_wall: when it began (seconds since the epoch).
        ready: seconds from exec to ready; None: it did not become ready, or not yet.
        identity: what was started, as starts.Identity has it.
        processes: those that came first, first.
        stalls: what the watchdogs told while it went on, in that order.
    """

    name: str
    began_wall: float
    ready: float | None
    identity: dict[str, str]
    processes: list[Process]
    stalls: list[ToldStall] = field(default_factory=list)

    @property
    def end(self) -> float:
        """When it was ready; else when the last event was written."""
        return self.ready if self.ready is not None else max(process.last for process in self.processes)

    @property
    def title(self) -> str:
        """Engine, model and layout, in a few words."""
        parts = (self.identity.get(name, "") for name in ("engine", "model", "layout", "load_format"))
        return " ".join(filter(None, parts))

    def end_of(self, process: Process, phase: Phase) -> float:
        """When a phase ended. One without an end went on while the start did; in a start that became ready, until its
        process was last heard of: it was killed, or failed.
        """
        if phase.ended is not None:
            return phase.ended
        return self.end if self.ready is None else max(process.last, phase.began)

    def phases(self, name: str) -> Iterator[tuple[Process, Phase]]:
        """Every phase of this name."""
        for process in self.processes:
            for phase in process.phases:
                if phase.name == name:
                    yield process, phase


def read_timeline(directory: Path) -> Timeline:
    """Read the events in the directory of a start.

    Raises:
        ReportError: there are none.
    """
    files = [events for path in sorted(directory.glob("*.jsonl")) if (events := _read_file(path))]
    processes = [(events, _process(events)) for events in files]
    if not processes:
        raise ReportError(f"{directory} has no events of a start")
    offsets = {process.node: _offset(events) for events, process in reversed(processes)}
    start = next(((events, process) for events, process in processes if _first(events, "point", "start")), processes[0])
    origin = _wall(start[1].began, start[1], offsets)
    point = _first(start[0], "point", "start")
    if point is not None and _is_later_start(start[0], point):
        origin = _wall(float(point["mono"]), start[1], offsets)
    ready = []
    stalls = []
    for events, process in processes:
        shift = offsets[process.node] - origin
        stalls += [
            ToldStall(process, float(event["mono"]) + shift, str(event.get("details", {}).get("text", "")))
            for event in events
            if event.get("phase") == STALL
        ]
        ready += [float(event["mono"]) + shift for event in events if event.get("phase") == READY]
        process.began, process.last = max(0.0, process.began + shift), process.last + shift
        for phase in process.phases:
            phase.began, phase.ended = phase.began + shift, None if phase.ended is None else phase.ended + shift
    found = sorted((process for _, process in processes), key=lambda process: process.began)
    _set_levels(found)
    identity = {name: str(value) for name, value in (point or {}).get("details", {}).items()}
    stalls.sort(key=lambda stall: stall.at)
    return Timeline(directory.name, origin, min(ready, default=None), identity, found, stalls)


def is_start(directory: Path) -> bool:
    """Whether a directory holds what ``read_timeline`` reads."""
    return any(directory.glob("*.jsonl")) or (directory / SUMMARY).exists()


def _read_file(path: Path) -> list[dict[str, Any]]:
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("mono"), int | float):
                events.append(event)
        except ValueError:
            continue
    return events


def _process(events: list[dict[str, Any]]) -> Process:
    first = next((event for event in events if event.get("event") == "process"), events[0])
    roles = [event["role"] for event in events if event.get("role")]
    ranks = [event["rank"] for event in events if event.get("rank") is not None]
    return Process(
        node=str(next((event["node"] for event in events if "node" in event), "")),
        pid=int(first.get("pid", 0)),
        parent=int(first.get("ppid", 0)),
        role=str(roles[-1]) if roles else "process",
        rank=int(ranks[-1]) if ranks else None,
        began=float(first.get("began", first["mono"])),
        last=max(float(event["mono"]) for event in events),
        phases=sorted(_phases(events), key=lambda phase: phase.began),
        cut=any(event.get("event") == "cut" for event in events),
    )


def _phases(events: list[dict[str, Any]]) -> Iterator[Phase]:
    # A process of the compile cache runs beside those of the engine, which say when they wait for it.
    beside = any(str(event.get("role", "")).startswith("compile cache") for event in events)
    ends = {event["id"]: event for event in events if event.get("event") == "end" and "id" in event}
    for event in events:
        if event.get("event") != "begin":
            continue
        end: Mapping[str, Any] = ends.get(event.get("id"), {})
        details = {**event.get("details", {}), **end.get("details", {})}
        ended = float(end["mono"]) if end else None
        flags = (beside or bool(event.get("beside")), bool(event.get("waits")))
        yield Phase(str(event["phase"]), float(event["mono"]), ended, int(event.get("tid", 0)), *flags, details)


def _first(events: list[dict[str, Any]], kind: str, phase: str) -> dict[str, Any] | None:
    return next((event for event in events if event.get("event") == kind and event.get("phase") == phase), None)


def _is_later_start(events: list[dict[str, Any]], point: Mapping[str, Any]) -> bool:
    """Whether the process made another engine before this one: its first events are in that one's directory then."""
    return not any(event.get("event") == "process" and event["mono"] <= point["mono"] for event in events)


def _offset(events: list[dict[str, Any]]) -> float:
    """Seconds from the monotonic clock of a machine to its wall clock."""
    return next((event["wall"] - event["mono"] for event in events if "wall" in event), 0.0)


def _wall(mono: float, process: Process, offsets: Mapping[str, float]) -> float:
    return mono + offsets[process.node]


def _set_levels(processes: list[Process]) -> None:
    by_number = {(process.node, process.pid): process for process in processes}
    for process in processes:
        above = by_number.get((process.node, process.parent))
        # Between the two may be one without this package, such as the server that forks others.
        process.level = above.level + 1 if above is not None else (1 if process is not processes[0] else 0)
