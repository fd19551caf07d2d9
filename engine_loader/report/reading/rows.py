"""A timeline as the rows of a waterfall: phases of one name within the same phase are one row."""

from __future__ import annotations

from dataclasses import dataclass, field

from .timeline import Phase, Process, Timeline


@dataclass
class Row:
    """One row; times are seconds since the start began.

    Attributes:
        name: of its phases.
        depth: in how many phases of its process they lie.
        pieces: when each began and ended.
        beside, waits: as of a phase.
        phases: the phases.
    """

    name: str
    depth: int
    pieces: list[tuple[float, float]] = field(default_factory=list)
    beside: bool = False
    waits: bool = False
    phases: list[Phase] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(ended - began for began, ended in self.pieces)

    @property
    def title(self) -> str:
        """The name, and how many phases there are if there are several."""
        return self.name if len(self.pieces) == 1 else f"{self.name} ({len(self.pieces)} times)"


def rows_of(timeline: Timeline, process: Process, *, shortest_s: float = 0.0) -> list[Row]:
    """The rows of a process in the order in which they began, up to the time at which the start was ready.

    Args:
        timeline: the start.
        process: one of its processes.
        shortest_s: rows that are shorter in all are left out.
    """
    rows: list[Row] = []
    open_phases: dict[int, list[tuple[float, Row]]] = {}  # thread -> those around, with their ends
    latest: dict[tuple[int, str], Row] = {}  # (the row around, or the thread; name) -> its row
    for phase in process.phases:
        if phase.began > timeline.end:
            continue
        ended = min(timeline.end_of(process, phase), timeline.end)
        around = open_phases.setdefault(phase.thread, [])
        while around and around[-1][0] <= phase.began:
            around.pop()
        place = (id(around[-1][1]) if around else phase.thread, phase.name)
        row = latest.get(place)
        if row is None:
            row = latest[place] = Row(phase.name, len(around), beside=phase.beside, waits=phase.waits)
            rows.append(row)
        row.pieces.append((phase.began, ended))
        row.phases.append(phase)
        around.append((ended, row))
    return [row for row in rows if row.seconds >= shortest_s]
