"""Metrics of a start, by Prometheus' conventions: through the engine's own /metrics, or as a file for node exporter.

All are gauges that are set once, when the engine is ready. The one label is the phase; there are some two dozen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import phases
from .reading.cache_use import IN_PLACE, restore_status
from .reading.critical_path import critical_path, seconds_by_phase
from .reading.timeline import Timeline

PHASE_LABEL = "phase"
METRICS = {
    "engine_loader_start_seconds": "Seconds from exec to ready.",
    "engine_loader_start_ready_timestamp_seconds": "When the engine was ready, in seconds since the epoch.",
    "engine_loader_start_phase_seconds": "Seconds of the time to ready that went to a phase.",
    "engine_loader_start_stalls": "Stalls that were told while the engine started.",
    "engine_loader_weights_loaded_bytes": "Bytes of weights that the ranks of this node kept.",
    "engine_loader_weights_load_seconds": "Seconds that the slowest rank read weights.",
    "engine_loader_weights_source_wait_seconds": "Seconds of these for which that rank waited for the source.",
    "engine_loader_weights_retried_reads": "Reads of weights that failed and were tried again.",
    "engine_loader_compile_cache_restored": "1 if the restore brought files, or had all in place, else 0.",
    "engine_loader_compile_cache_restore_seconds": "Seconds that the restore of the compile cache took.",
    "engine_loader_compile_cache_restored_bytes": "Bytes that the restore brought.",
}
"""Name -> what it is. ``engine_loader_start_phase_seconds`` has the label ``phase``, the others have none."""


@dataclass(frozen=True)
class Sample:
    """A value of a metric; ``phase`` is "" for metrics without the label."""

    name: str
    value: float
    phase: str = ""


def samples_of(timeline: Timeline) -> Iterator[Sample]:
    """The metrics of a start that became ready; those of what it did not do are left out."""
    if timeline.ready is None:
        return
    yield Sample("engine_loader_start_seconds", timeline.ready)
    yield Sample("engine_loader_start_ready_timestamp_seconds", timeline.began_wall + timeline.ready)
    for phase, seconds in seconds_by_phase(critical_path(timeline)).items():
        yield Sample("engine_loader_start_phase_seconds", seconds, phase or "unknown")
    yield Sample("engine_loader_start_stalls", len(timeline.stalls))
    loads = [phase.details for _, phase in timeline.phases(phases.WEIGHT_READING) if "seconds" in phase.details]
    if loads:
        slowest: dict[str, Any] = max(loads, key=lambda load: load["seconds"])
        yield Sample("engine_loader_weights_loaded_bytes", sum(load.get("bytes", 0) for load in loads))
        yield Sample("engine_loader_weights_load_seconds", slowest["seconds"])
        yield Sample("engine_loader_weights_source_wait_seconds", slowest.get("waited", {}).get("source", 0.0))
        yield Sample("engine_loader_weights_retried_reads", sum(load.get("retries", 0) for load in loads))
    restores = [pair for pair in timeline.phases(phases.RESTORE) if "status" in pair[1].details]
    if restores:
        process, restore = max(restores, key=lambda pair: pair[1].details.get("bytes", 0))
        yield Sample("engine_loader_compile_cache_restored", restore_status(timeline) in IN_PLACE)
        yield Sample("engine_loader_compile_cache_restore_seconds", timeline.end_of(process, restore) - restore.began)
        yield Sample("engine_loader_compile_cache_restored_bytes", restore.details.get("bytes", 0))


def text_of(timeline: Timeline) -> str:
    """The metrics in Prometheus' text format."""
    lines = []
    told = ""
    for sample in samples_of(timeline):
        if sample.name != told:
            lines += [f"# HELP {sample.name} {METRICS[sample.name]}", f"# TYPE {sample.name} gauge"]
            told = sample.name
        label = f'{{{PHASE_LABEL}="{_escaped(sample.phase)}"}}' if sample.phase else ""
        lines.append(f"{sample.name}{label} {float(sample.value)!r}")
    return "".join(f"{line}\n" for line in lines)


def write_textfile(path: Path, timeline: Timeline) -> None:
    """Write the metrics for node exporter's textfile collector, which reads ``*.prom`` of a directory.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # a scrape sees all of the file or nothing of it
    beside.write_text(text_of(timeline))
    beside.chmod(0o644)
    beside.replace(path)


def set_gauges(timeline: Timeline) -> bool:
    """Set the metrics in the default registry of prometheus_client, if this process has imported it.

    vLLM's and SGLang's /metrics serve that registry, and what several processes share (PROMETHEUS_MULTIPROC_DIR).

    Returns:
        Whether prometheus_client is there.
    """
    client = sys.modules.get("prometheus_client")
    if client is None:
        return False
    for sample in samples_of(timeline):
        labels = [PHASE_LABEL] if sample.phase else []
        gauge = _gauges.get(sample.name)
        if gauge is None:
            gauge = client.Gauge(sample.name, METRICS[sample.name], labels, multiprocess_mode="mostrecent")
            _gauges[sample.name] = gauge
        (gauge.labels(sample.phase) if sample.phase else gauge).set(float(sample.value))
    return True


_gauges: dict[str, Any] = {}


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
