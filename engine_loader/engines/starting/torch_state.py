"""What torch has computed from the environment when it was imported, and what it is in another one."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from typing import Any


def mend_torch(changed: Collection[str]) -> None:
    """Give it the values of this process's environment.

    Args:
        changed: names of the variables that have another value than when torch was imported.
    """
    if "OMP_NUM_THREADS" in changed:
        _set_threads(os.environ.get("OMP_NUM_THREADS", ""))
    if {"TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS"} & set(changed):
        mend_inductor()


def mend_inductor() -> None:
    """Give inductor's configuration, if it was imported, the values of this process's environment."""
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:
        config.compile_threads = config.decide_compile_threads()
        config.cpp.dynamic_threads = os.environ.get("TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "0") == "1"


def _set_threads(count: str) -> None:
    import torch

    torch.set_num_threads(int(count) if count.isdigit() else len(os.sched_getaffinity(0)))
