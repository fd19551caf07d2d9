"""Where processes wait for each other: what a rank copied before it, the others may read after it.

Some loaders copy on one rank into memory that others share, and then pass a barrier (embedding tables of data-parallel
ranks). A barrier says nothing of that memory, so all pending copies are complete before it begins.
"""

from __future__ import annotations

import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.synchronize
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch

from .torch_private import collective_classes, operation_name

_COLLECTIVES = (
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "all_gather_single",
    "all_to_all_single",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "scatter",
    "send",
)
_STORE_METHODS = (
    "add",
    "append",
    "barrier",
    "check",
    "compare_set",
    "get",
    "multi_get",
    "multi_set",
    "queue_pop",
    "queue_push",
    "set",
    "wait",
)
_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "symm_mem")


@cache
def is_collective(packet: Any) -> bool:
    """Whether an operation (``c10d.allreduce_``) is one of several ranks."""
    return operation_name(packet).partition("::")[0] in _NAMESPACES


def places_to_meet() -> Iterator[tuple[Any, Sequence[str]]]:
    """(class, names of its methods): collectives and stores of torch.distributed, and Python's multiprocessing."""
    if torch.distributed.is_available():
        groups, store = collective_classes()
        for group in groups:
            yield group, _there(group, _COLLECTIVES)
        yield store, _there(store, _STORE_METHODS)
    yield multiprocessing.connection.Connection, ("send", "send_bytes")
    yield multiprocessing.queues.Queue, ("put",)
    yield multiprocessing.queues.SimpleQueue, ("put",)
    yield multiprocessing.synchronize.Barrier, ("wait",)
    yield multiprocessing.synchronize.Event, ("set", "wait")


def _there(holder: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if hasattr(holder, name)]
