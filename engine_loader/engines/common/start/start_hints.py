"""What would make later starts shorter, and is the user's to decide: said in the log, or done where it is asked for."""

from __future__ import annotations

import logging
import os

from ....report.phases import GRAPH_ESTIMATE
from ....report.reading.timeline import Timeline
from ....settings import load_settings
from ....start.bytecode import OFFER, why_not_kept

PLAN_VARIABLE = "VLLM_ENABLE_STARTUP_PLAN"
_WORTH_A_LINE_S = 0.5


def keep_plan(knows: bool) -> str | None:
    """Have vLLM keep the size of the KV cache that it measures, where ``start.plan`` asks for it; to be called before
    its other processes are there, which inherit the variable. One that is set is left as it is.

    Args:
        knows: whether this version of vLLM has such plans.

    Returns:
        What the log should say; None: nothing.
    """
    if load_settings().settings.start.plan != "on" or PLAN_VARIABLE in os.environ:
        return None
    if not knows:
        return "start.plan: this version of vLLM has no startup plans"
    os.environ[PLAN_VARIABLE] = "1"
    return None


def plan_hint(timeline: Timeline) -> str | None:
    """What to say of a start that measured what an earlier one could have kept; None: nothing."""
    if load_settings().settings.start.plan != "auto" or PLAN_VARIABLE in os.environ:
        return None
    seconds: dict[int, float] = {}
    for process, phase in timeline.phases(GRAPH_ESTIMATE):
        seconds[id(process)] = seconds.get(id(process), 0.0) + timeline.end_of(process, phase) - phase.began
    longest = max(seconds.values(), default=0.0)
    if longest < _WORTH_A_LINE_S:
        return None
    return (
        f"start.plan: {longest:.1f} s went to the estimate of the memory of CUDA graphs; with start.plan: on, vLLM "
        "keeps the size of the KV cache, and later starts of the same kind leave that out"
    )


def tell_bytecode(engine: str, log: logging.Logger) -> None:
    """Say where the engine's modules are compiled anew in each start."""
    reason = why_not_kept(engine)
    if reason is not None:
        log.info("start: Python compiles %s's modules in every start, for %s: %s", engine, reason, OFFER)
