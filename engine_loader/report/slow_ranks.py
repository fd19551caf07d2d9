"""Ranks that lag behind the others of their engine, by the events of all processes."""

from __future__ import annotations

from collections.abc import Iterator

from . import phases
from .reading.timeline import Phase, Process, Timeline
from .stalls import Stall

_RANKED = ((phases.WEIGHTS, "load weights", "loading weights"), (phases.WARM_UP, "warm up", "warming up"))


def slow_ranks(timeline: Timeline, now: float, stall_s: float) -> Iterator[Stall]:
    """The ranks that lag behind all others by ``stall_s`` seconds.

    Args:
        timeline: the start so far.
        now: seconds since it began.
        stall_s: how far behind counts.
    """
    ranks = [process for process in timeline.processes if process.rank is not None]
    for name, infinitive, gerund in _RANKED:
        found = {id(rank): [phase for phase in rank.phases if phase.name == name] for rank in ranks}
        for rank in ranks:
            others = [found[id(other)] for other in ranks if other is not rank]
            own = found[id(rank)]
            if not others or not all(others):
                continue
            if not own:
                since = now - max(phases_of[0].began for phases_of in others)
                if since >= stall_s:
                    yield Stall(
                        f"{name} of rank {rank.rank}",
                        f"rank {rank.rank} has not begun to {infinitive}, and the others did {since:.0f} s ago: "
                        f"{_whereabouts(rank)}",
                    )
            elif own[-1].ended is None:
                ends = [phase.ended for phases_of in others for phase in phases_of]
                if None not in ends and (since := now - max(end for end in ends if end is not None)) >= stall_s:
                    yield Stall(
                        f"end of {name} of rank {rank.rank}",
                        f"rank {rank.rank} is still {gerund}, and the others ended {since:.0f} s ago: "
                        f"{_whereabouts(rank)}",
                    )


def _whereabouts(process: Process) -> str:
    open_phases: list[Phase] = [phase for phase in process.phases if phase.ended is None and not phase.beside]
    where = f'in the phase "{open_phases[-1].name}"' if open_phases else "in no phase that is known"
    return f"it is {where} (pid {process.pid} on {process.node})"
