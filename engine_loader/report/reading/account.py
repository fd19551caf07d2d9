"""A start with all that is made of it, for the terminal, JSON and the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..starts import ReportError, starts_in
from .advice import Advice, advice
from .cache_use import has_served, restore_status, verdict_of
from .critical_path import Stretch, coverage, critical_path, seconds_by_phase
from .timeline import Timeline, read_timeline


@dataclass(frozen=True)
class Account:
    """A start: its timeline, its critical path, and what would help."""

    timeline: Timeline
    path: list[Stretch]
    advice: list[Advice]

    @property
    def coverage(self) -> float:
        """The share (0 to 1) of the time that is in a known phase."""
        return coverage(self.path)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; times are seconds since the start began."""
        timeline = self.timeline
        return {
            "start": timeline.name,
            "began_wall": timeline.began_wall,
            "identity": timeline.identity,
            "ready_s": timeline.ready,
            "compile_cache": restore_status(timeline),
            "compile_cache_verdict": verdict_of(timeline),
            "coverage": round(self.coverage, 4),
            "seconds_by_phase": {name or "unknown": seconds for name, seconds in seconds_by_phase(self.path).items()},
            "critical_path": [
                {
                    "process": stretch.process.title if stretch.process is not None else None,
                    "phase": stretch.name or None,
                    "began_s": stretch.began,
                    "ended_s": stretch.ended,
                }
                for stretch in self.path
            ],
            "stalls": [
                {"process": stall.process.title, "at_s": stall.at, "text": stall.text} for stall in timeline.stalls
            ],
            "advice": [asdict(one) for one in self.advice],
            "processes": [asdict(process) for process in timeline.processes],
        }


def account_of(directory: Path) -> Account:
    """Read a start; earlier ones beside it tell what a compile cache saves that was restored and served.

    Raises:
        ReportError: it has no events.
    """
    timeline = read_timeline(directory)
    path = critical_path(timeline)
    earlier = []
    for other in starts_in(directory.parent):
        if other != directory:
            try:
                found = read_timeline(other)
            except ReportError:
                continue
            if found.ready and found.identity.get("key") == timeline.identity.get("key") and has_served(found):
                earlier.append(seconds_by_phase(critical_path(found)))
    return Account(timeline, path, advice(timeline, path, earlier))
