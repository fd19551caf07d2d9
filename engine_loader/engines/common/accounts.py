"""The account of a load, rank by rank: a line of the log, a record with the numbers, and the sum of all ranks.

Each rank leaves its numbers in the key-value store that torch.distributed has anyway, and a thread of the first one
looks there for those of the others. Nobody waits for a rank that never comes.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from ...plugin import LOAD_FORMAT
from ...report.load_report import LoadReport, human_bytes

NUMBERS = "engine_loader_load"
"""Attribute of the log records, for programs: the numbers of a load as a dictionary (docs/vllm.md)."""
_PATIENCE_S = 300.0
_LOOK_S = 0.2
_loads = itertools.count()


def tell_load(log: logging.Logger, report: LoadReport, line: str) -> None:
    """Log the account of a load: at level INFO in the first rank, at level DEBUG in the others.

    The first of several ranks also logs the sum of all, as soon as the others have loaded.
    """
    rank, ranks = _place()
    numbers = numbers_of(report, rank, ranks)
    read = f", read {human_bytes(report.bytes_read)}" if report.bytes_read else ""
    where = f"rank {rank} of {ranks}: " if ranks > 1 else ""
    level = logging.INFO if rank == 0 else logging.DEBUG
    log.log(level, "%s: %s%s%s", LOAD_FORMAT, where, line, read, extra={NUMBERS: numbers})
    if ranks > 1:
        key = f"{NUMBERS}/{next(_loads)}"
        with suppress(Exception):  # no store, or one that has gone: an account is no reason to fail
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"{key}/{rank}", json.dumps(numbers))
            if rank == 0:
                threading.Thread(
                    target=_tell_sum, args=(log, store, key, ranks), name="engine-loader-accounts", daemon=True
                ).start()


def numbers_of(report: LoadReport, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """The numbers of a load, for JSON: bytes, seconds, and who read how."""
    return {
        "rank": rank,
        "ranks": ranks,
        "tensors": report.tensors,
        "files": report.files,
        "bytes_offered": report.bytes_offered,
        "bytes_kept": report.bytes_loaded,
        "bytes_read": report.bytes_read,
        "seconds": report.seconds,
        "source": report.source,
        "engine": report.engine,
        "modes": sorted(report.modes),
        "peak_buffer_bytes": report.peak_buffer_bytes,
        "retries": report.retries,
        "first_retry": report.first_retry,
        "slowest_file": report.slowest_file,
        "notes": list(report.notes),
    }


def is_first_rank() -> bool:
    """True for rank 0 of torch.distributed, and where torch.distributed is not initialised."""
    return _place()[0] == 0


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _tell_sum(log: logging.Logger, store: Any, key: str, ranks: int) -> None:
    keys = [f"{key}/{rank}" for rank in range(ranks)]
    end = time.monotonic() + _PATIENCE_S
    with suppress(Exception):  # the processes of an engine that ends take the store with them
        while not store.check(keys):
            if time.monotonic() > end:
                return
            time.sleep(_LOOK_S)
        loads = [json.loads(store.get(name)) for name in keys]
        for name in keys:
            store.delete_key(name)
        log.info("%s: %s", LOAD_FORMAT, sum_line(loads), extra={NUMBERS: {"all_ranks": loads}})


def sum_line(loads: Sequence[dict[str, Any]]) -> str:
    """One line about the loads of all ranks, each from ``numbers_of``."""
    kept, read, retries = (sum(load[what] for load in loads) for what in ("bytes_kept", "bytes_read", "retries"))
    slowest = max(loads, key=lambda load: float(load["seconds"]))
    seconds = float(slowest["seconds"])
    tried = f"; {retries} reads tried again" if retries else ""
    return (
        f"all {len(loads)} ranks: loaded {human_bytes(kept)}, read {human_bytes(read)}, in {seconds:.2f} s, "
        f"{kept / max(seconds, 1e-9) / 1e9:.2f} GB/s together; the slowest is rank {slowest['rank']}{tried}"
    )
