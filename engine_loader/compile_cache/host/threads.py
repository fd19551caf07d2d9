"""How many threads a CPU engine's rank computes with: inductor bakes the number into C++ kernels."""

from __future__ import annotations

import os

_BINDINGS = ("VLLM_CPU_OMP_THREADS_BIND", "SGLANG_CPU_OMP_THREADS_BIND")


def threads() -> str:
    """The number of threads of a rank: "32"; "32+16" where the ranks of this node differ.

    What counts is the number: engines on other processors of a node make the same kernels.
    """
    for variable in _BINDINGS:
        counts = _bound(os.environ.get(variable, ""))
        if counts:
            return "+".join(dict.fromkeys(map(str, counts)))
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return first if first.isdecimal() and int(first) else str(len(os.sched_getaffinity(0)))


def _bound(text: str) -> list[int]:
    """The number of processors of each rank in "0-31|32,40-63"; empty for "auto", "nobind" and what is no such list."""
    try:
        return [_count(ids) for ids in text.split("|")] if text else []
    except ValueError:
        return []


def _count(ids: str) -> int:
    found: set[int] = set()
    for part in ids.split(","):
        first, dash, last = part.strip().partition("-")
        found.update(range(int(first), int(last if dash else first) + 1))
    return len(found)
