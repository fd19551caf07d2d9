"""How many threads read, and on which CPUs."""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..machine import cgroup_cpus, usable_cpus

_MOST_THREADS = 16
"""Copying out of the page cache saturates the memory of current servers with about this many threads."""
_NODES = Path("/sys/devices/system/node")


def default_threads(cpus: frozenset[int] | None = None) -> int:
    """One thread for each CPU that this process may use, a cgroup's quota counted, up to 16.

    Args:
        cpus: the CPUs that the threads are kept to, if they are.
    """
    count = usable_cpus() if cpus is None else len(cpus)
    quota = _quota()
    if quota is not None:
        count = min(count, math.ceil(quota))
    return max(1, min(count, _MOST_THREADS))


def local_cpus(nodes: Path = _NODES) -> frozenset[int] | None:
    """The usable CPUs of the memory node on which the caller runs; None where there is but one node to choose from.

    Fresh memory comes from the node of the thread that touches it first, so threads of one node keep a model on it.
    """
    usable = os.sched_getaffinity(0)
    groups = [cpus & usable for cpus in _cpus_by_node(nodes)]
    groups = [cpus for cpus in groups if cpus]
    if len(groups) < 2:
        return None
    here = ctypes.CDLL(None).sched_getcpu()
    return next((frozenset(cpus) for cpus in groups if here in cpus), None)


# Reader threads come and go with the checkpoints that they read; what these files say stays, and asking takes longer
# than all else that starts one.
@cache
def _quota() -> float | None:
    return cgroup_cpus()


@cache
def _cpus_by_node(nodes: Path) -> Sequence[set[int]]:
    found = []
    for path in sorted(nodes.glob("node[0-9]*/cpulist")):
        ranges = re.findall(r"(\d+)(?:-(\d+))?", path.read_text())
        found.append({cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)})
    return found
