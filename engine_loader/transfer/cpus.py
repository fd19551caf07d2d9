"""How many threads read, and on which CPUs."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ..machine import cgroup_cpus, usable_cpus

_MOST_THREADS = 16
"""Copying out of the page cache saturates the memory of current servers with about this many threads."""
_WIDE_THREADS = 8
_MOST_WIDE_THREADS = 64
"""So many reads of 4 MiB carry 50 GB/s where each takes 5 ms."""
_MOST_IN_FLIGHT = 256 << 20
_NODES = Path("/sys/devices/system/node")


def default_threads(cpus: frozenset[int] | None = None, ranks: int = 1) -> int:
    """One thread for each CPU that this process may use, a cgroup's quota counted, up to 16.

    Args:
        cpus: the CPUs that the threads are kept to, if they are.
        ranks: processes that share the machine's CPUs and the quota. One that is bound to CPUs of its own keeps them.
    """
    count = usable_cpus() if cpus is None else len(cpus)
    if ranks > 1:
        count = min(count, max(count, _cpus_of_parent()) // ranks)
    quota = _quota()
    if quota is not None:
        count = min(count, math.ceil(quota / ranks))
    return max(1, min(count, _MOST_THREADS))


def waiting_threads(threads: int, io_bytes: int, ranks: int = 1) -> tuple[int, int]:
    """(how many read at first, the most) where reads wait for storage rather than for a CPU.

    Args:
        threads: those for reads that take a CPU.
        io_bytes: what each reads at a time.
        ranks: processes that share the machine.
    """
    first = max(threads, min(_WIDE_THREADS, max(2, 2 * _WIDE_THREADS // ranks)))
    return first, max(first, min(_MOST_WIDE_THREADS, _MOST_IN_FLIGHT // io_bytes) // ranks)


def ranks_of_node() -> int:
    """How many processes of a job run on this machine, as far as the job says.

    LOCAL_WORLD_SIZE, which torchrun sets; else the ranks of torch.distributed, but no more than there are GPUs; else 1.
    """
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    ranks = int(torch.distributed.get_world_size())
    return min(ranks, torch.cuda.device_count()) if torch.cuda.is_available() else ranks


def local_cpus(nodes: Path = _NODES) -> frozenset[int] | None:
    """The usable CPUs of the memory node on which the caller runs; None where there is but one node to choose from.

    Fresh memory comes from the node of the thread that touches it first, so threads of one node keep a model on it.
    """
    here = ctypes.CDLL(None).sched_getcpu()
    return next((cpus for cpus in _usable_by_node(nodes).values() if here in cpus), None)


def cpus_of_node(node: int | None, nodes: Path = _NODES) -> frozenset[int] | None:
    """The usable CPUs of a memory node; None where it has none, or there is but one node to choose from."""
    return None if node is None else _usable_by_node(nodes).get(node)


def _usable_by_node(nodes: Path) -> dict[int, frozenset[int]]:
    """Empty where there is but one node to choose from."""
    usable = os.sched_getaffinity(0)
    groups = {node: frozenset(cpus & usable) for node, cpus in _cpus_by_node(nodes).items()}
    groups = {node: cpus for node, cpus in groups.items() if cpus}
    return groups if len(groups) > 1 else {}


def _cpus_of_parent() -> int:
    """CPUs of the process that started this one: all ranks together have these, each perhaps only some."""
    try:
        return len(os.sched_getaffinity(os.getppid()))
    except OSError:  # it is not to be seen from this container
        return 0


# Reader threads come and go with the checkpoints that they read; what these files say stays, and asking takes longer
# than all else that starts one.
@cache
def _quota() -> float | None:
    return cgroup_cpus()


@cache
def _cpus_by_node(nodes: Path) -> Mapping[int, set[int]]:
    found = {}
    for path in sorted(nodes.glob("node[0-9]*/cpulist")):
        ranges = re.findall(r"(\d+)(?:-(\d+))?", path.read_text())
        node = int(path.parent.name.removeprefix("node"))
        found[node] = {cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)}
    return found
