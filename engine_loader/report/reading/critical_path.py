"""What the time from exec to ready was spent on.

At each moment one phase counts: of the processes that do something, that of the one furthest down, for those above
wait for it; of several ranks, that of the rank whose phase ends last. Within a process it is the innermost phase. Those
that only wait for other processes, or run beside the start, count where nothing else goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .timeline import Phase, Process, Timeline


@dataclass(frozen=True)
class Stretch:
    """A part of the critical path; times are seconds since the start began.

    Attributes:
        process: that was at work; None: no process was in any phase.
        phase: the innermost one.
    """

    process: Process | None
    phase: Phase | None
    began: float
    ended: float

    @property
    def name(self) -> str:
        """The phase's name; "" for none."""
        return self.phase.name if self.phase is not None else ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def critical_path(timeline: Timeline) -> list[Stretch]:
    """The stretches from exec to ready, in order and without gaps."""
    end = timeline.end
    edges = {0.0, end}
    for each in timeline.processes:
        for one in each.phases:
            edges |= {edge for edge in (one.began, timeline.end_of(each, one)) if 0.0 < edge < end}
    path: list[Stretch] = []
    for began, ended in pairwise(sorted(edges)):
        process, phase = _at((began + ended) / 2, timeline)
        last = path[-1] if path else None
        if last is not None and last.phase is phase and last.process is process:
            path[-1] = Stretch(process, phase, last.began, ended)
        else:
            path.append(Stretch(process, phase, began, ended))
    return path


def seconds_by_phase(path: Sequence[Stretch]) -> dict[str, float]:
    """Name of a phase -> its seconds on the critical path, the longest first; "" for what is in no phase."""
    found: dict[str, float] = {}
    for stretch in path:
        found[stretch.name] = found.get(stretch.name, 0.0) + stretch.seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def coverage(path: Sequence[Stretch]) -> float:
    """The share (0 to 1) of the time to ready that is in a phase in which some process did something."""
    whole = sum(stretch.seconds for stretch in path)
    named = sum(stretch.seconds for stretch in path if stretch.phase is not None and not stretch.phase.waits)
    return named / whole if whole > 0 else 0.0


def _at(moment: float, timeline: Timeline) -> tuple[Process | None, Phase | None]:
    best: tuple[tuple[bool, bool, int, float], Process, Phase] | None = None
    for process in timeline.processes:
        inside = [phase for phase in process.phases if phase.began <= moment < timeline.end_of(process, phase)]
        # The innermost one began last; of two that began at once, the one that was written last.
        phase = max(reversed(inside), key=lambda phase: (not phase.beside, phase.began), default=None)
        if phase is None:
            continue
        rank = (not phase.beside, not phase.waits, process.level, timeline.end_of(process, phase))
        if best is None or rank > best[0]:
            best = (rank, process, phase)
    return (best[1], best[2]) if best is not None else (None, None)
