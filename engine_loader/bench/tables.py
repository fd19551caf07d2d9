"""Results of measurements as rows and Markdown, and the description of the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__
from ..machine import cgroup_cpus, cpu_model, memory, mount_of, usable_cpus
from ..report.load_report import human_bytes
from .rounds import Measurement, Result
from .workload import Workload

_PACKAGES = ("torch", "safetensors", "fastsafetensors", "runai-model-streamer")
COLUMNS = ("reads with", "GB/s, median", "slowest - fastest", "of the limit")
_BAR_CHARS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"


def describe_machine(workload: Workload) -> dict[str, Any]:
    """The properties of the machine and its software on which figures depend."""
    mount, total = None if workload.remote else mount_of(workload.files[0]), memory().total
    return {
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "cpu_quota": cgroup_cpus(),
        "memory_bytes": total,
        "kernel": platform.release(),
        "file_system": "object store" if workload.remote else mount.kind if mount else "unknown",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "engine_loader": __version__,
        **{name: found for name in _PACKAGES if (found := _version(name))},
    }


def machine_line(machine: dict[str, Any]) -> str:
    """A machine's description, from ``describe_machine``, in one line."""
    quota = f" (quota {machine['cpu_quota']:g})" if machine["cpu_quota"] else ""
    packages = ", ".join(f"{name} {machine[name]}" for name in ("engine_loader", *_PACKAGES) if name in machine)
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs{quota}, {human_bytes(machine['memory_bytes'])} of memory, "
        f"Linux {machine['kernel']}, {machine['file_system']}, load average {machine['load_average']} at the start; "
        f"Python {machine['python']}, {packages}"
    )


def workload_line(workload: Workload) -> str:
    """Bytes, tensors and files of a workload, in one line."""
    count = len(workload.files)
    return f"{human_bytes(workload.nbytes)} in {len(workload.tensors)} tensors, {count} file{'' if count == 1 else 's'}"


def rows(measurement: Measurement) -> list[tuple[str, str, str, str]]:
    """A row for every contender: name, median GB/s, range, share of the limit."""
    return [(result.contender.name, *_figures(measurement, result)) for result in measurement.results]


def bars(measurement: Measurement) -> list[str]:
    """A bar for every contender; that of the fastest is full, and one that failed has none."""
    most = max((result.median for result in measurement.results), default=0.0)
    return [_bar(result.median / most if most else 0.0) for result in measurement.results]


def _bar(share: float) -> str:
    eighths = round(share * _BAR_CHARS * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def ways(measurement: Measurement) -> list[str]:
    """The contenders' descriptions of how they read, each description once."""
    said = {result.how: result.contender.name for result in reversed(measurement.results) if result.how}
    return [f"{name}: {how}" for how, name in sorted(said.items(), key=lambda item: item[1])]


def markdown(measurement: Measurement) -> str:
    """A section of Markdown with a table of the results."""
    lines = [f"### {measurement.scenario.title[0].upper()}{measurement.scenario.title[1:]}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(measurement)]
    notes = [*ways(measurement), *(f"**Note:** {warning}" for warning in measurement.warnings)]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip() + "\n"


def _figures(measurement: Measurement, result: Result) -> tuple[str, str, str]:
    share = measurement.of_limit(result)
    if share is None:
        return f"failed: {result.error}", "", ""
    limit = " (the limit)" if measurement.limit is result else ""
    return f"{result.median:.2f}", f"{min(result.rates):.2f} - {max(result.rates):.2f}", f"{share:.0%}{limit}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
