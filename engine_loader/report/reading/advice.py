"""What a start's time went to, in words, and what would shorten it most.

Only what was measured in this start, or in an earlier one of the same engine and model, is said in figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import phases
from ..load_report import human_bytes
from .cache_use import IN_PLACE, restore_in_words, restore_status, use_in_words, verdict_of
from .critical_path import Stretch, seconds_by_phase
from .timeline import Timeline

_WORTH_A_WORD = 0.03  # of the whole
_WORTH_A_WORD_S = 0.5
_MOST_OF = 0.5

_WHAT_HELPS = {
    phases.IMPORTS: "one process after another imports; files in the page cache, a local disk and faster CPUs help",
    phases.INSPECTION: "vLLM starts a process to look at the model's class unless its description is cached "
    "(VLLM_CACHE_ROOT; the compile cache restores it)",
    phases.GRAPH_CAPTURE: "graphs cannot be cached; fewer batch sizes to capture make it shorter",
    phases.GRAPH_ESTIMATE: "vLLM captures graphs on trial to estimate their memory; with start.plan: on it keeps what "
    "it measured, and later starts of the same kind leave that out",
    phases.HEADERS: "the files are opened and their headers read: fewer and larger files, or a source that answers "
    "faster, help",
    phases.RESTORE_WAIT: "compilation waits for the compile cache: a store that is nearer or faster helps",
    phases.AFTER_WEIGHTS: "the engine converts weights for its kernels: a checkpoint in its own layout "
    "(`engine-loader reshard`) may save that",
    "": "no phase is known for it",
}


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        phase: that it is about.
        seconds: of the critical path.
        text: what was found, and what would help.
    """

    phase: str
    seconds: float
    text: str


def advice(timeline: Timeline, path: list[Stretch], earlier: Iterable[Mapping[str, float]] = ()) -> list[Advice]:
    """The findings of a start, the one with the most seconds first.

    Args:
        timeline: the start.
        path: its critical path.
        earlier: seconds by phase of earlier starts of the same kind whose compile cache was restored.
    """
    by_phase = seconds_by_phase(path)
    least = max(_WORTH_A_WORD_S, _WORTH_A_WORD * timeline.end)
    found = []
    compiling = sum(by_phase.get(name, 0.0) for name in phases.COMPILING)
    if compiling >= least:
        found.append(Advice(phases.COMPILE, compiling, _of_compiling(timeline, compiling, earlier)))
    if by_phase.get(phases.WEIGHT_READING, 0.0) >= least:
        seconds = by_phase[phases.WEIGHT_READING]
        found.append(Advice(phases.WEIGHT_READING, seconds, _of_weights(timeline, seconds)))
    for name, seconds in by_phase.items():
        if seconds >= least and name in _WHAT_HELPS:
            where = f"{name or 'unknown'} {seconds:.1f} s{_in_processes(path, name)}"
            found.append(Advice(name, seconds, f"{where}: {_WHAT_HELPS[name]}"))
    return sorted(found, key=lambda one: -one.seconds)


def _of_compiling(timeline: Timeline, seconds: float, earlier: Iterable[Mapping[str, float]]) -> str:
    status = restore_status(timeline)
    where = f"compile and warm-up {seconds:.1f} s"
    # Also without a restore, what lay in the local caches may have served.
    if status in IN_PLACE or verdict_of(timeline) in ("hit", "partial"):
        return f"{where}: {use_in_words(timeline)}"
    restored = [sum(found.get(name, 0.0) for name in phases.COMPILING) for found in earlier]
    why = restore_in_words(status)
    if restored and min(restored) < seconds:
        saved = seconds - min(restored)
        return f"{where}: {why}; a restored one would have saved about {saved:.0f} s, as in an earlier start"
    return f"{where}: {why}; the next start of this kind is shorter where its cache is restored"


def _of_weights(timeline: Timeline, seconds: float) -> str:
    found = max(timeline.phases(phases.WEIGHT_READING), key=lambda pair: timeline.end_of(*pair) - pair[1].began)[1]
    details: Mapping[str, Any] = found.details
    took = max(float(details.get("seconds") or seconds), 1e-9)
    nbytes = float(details.get("bytes") or 0)
    waited = details.get("waited") or {}
    source = float(waited.get("source", 0.0))
    text = f"weights {seconds:.1f} s: {human_bytes(nbytes)} at {nbytes / took / 1e9:.2f} GB/s"
    text += f" from {details['source']}" if details.get("source") else ""
    if source > _MOST_OF * took:
        text += f", {source / took:.0%} of it waiting for the source: `engine-loader bench read` shows its limit here"
    elif details.get("waited"):
        text += (
            f", {source / took:.0%} of it waiting for the source: the rest is the engine's own work on the tensors, "
            "which faster storage does not shorten"
        )
    if details.get("retries"):
        text += f"; {details['retries']} reads failed and were tried again"
    return text


def _in_processes(path: list[Stretch], name: str) -> str:
    titles = {stretch.process.title for stretch in path if stretch.name == name and stretch.process is not None}
    return f" in {len(titles)} processes" if len(titles) > 1 else ""
