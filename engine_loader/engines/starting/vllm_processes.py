"""vLLM's processes: the engine and its workers are forked from a copy of the first process of ``vllm serve``.

The plugin registers there when vLLM builds its parser of arguments: by then vLLM has imported nearly all of itself, and
there is no event loop, no engine, no accelerator in use yet. Facts: vLLM 0.32, ``vllm/entrypoints/cli/main.py``,
``vllm/v1/engine/utils.py`` (CoreEngineProcManager), ``vllm/v1/executor/multiproc_executor.py`` (WorkerProc),
``vllm/platforms/cpu.py`` (variables that are set for children), ``vllm/utils/ompmultiprocessing.py``.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess

from ...start.fitness import changed_variables
from ...start.spawned import Plan, Role, begin
from .template_terms import role_among, template_setting, why_not_in
from .torch_state import mend_torch

logger = logging.getLogger("vllm.engine_loader")

_ROLES = {
    ("vllm.v1.engine.core", "EngineCoreProc.run_engine_core"): Role(makes_others=True),
    ("vllm.v1.executor.multiproc_executor", "WorkerProc.worker_main"): Role(makes_others=False),
}
_IMPORTS = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.model_loader",
)
_GPU_WORKER = "vllm.v1.worker.gpu_worker"
_WORKERS = {"cpu": "vllm.v1.worker.cpu_worker", "cuda": _GPU_WORKER, "rocm": _GPU_WORKER}

_MAY_DIFFER = re.compile(
    # Read when they are used: by vllm.envs, by libraries of vLLM's, by this package, or for children only.
    "VLLM_WORKER_MULTIPROC_METHOD|VLLM_ENABLE_STARTUP_PLAN|VLLM_DISABLE_SHARED_EXPERTS_STREAM"
    "|VLLM_SSM_CONV_STATE_LAYOUT|NUMEXPR_MAX_THREADS"
    "|LOCAL_WORLD_SIZE|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|CUTE_DSL_CACHE_DIR|OLDPWD|PWD|_|SHLVL|_?ENGINE_LOADER_.*"
    # Seen to in the child: by ``mend``, or by a reason against it.
    "|TORCHINDUCTOR_COMPILE_THREADS|TORCHINDUCTOR_CPP_DYNAMIC_THREADS|OMP_NUM_THREADS|GOMP_CPU_AFFINITY|LD_PRELOAD"
)


def register() -> None:
    """Make the template where this is the first process of ``vllm serve`` and the settings allow it."""
    if not _is_first_process():
        return
    setting = template_setting()
    if setting == "off":
        return
    platform = _platform()
    reason = None
    if platform != "cpu" and setting == "auto":
        reason = f"it has not been tested on {platform}: start.template: on has it anyway"
    imports = (*_IMPORTS, *filter(None, [_WORKERS.get(platform)]))
    if reason is None:
        reason = begin(Plan(role_of, why_not, imports, mend, logger))
    if reason is not None:
        logger.info("start.template: processes of this start are spawned: %s", reason)


def role_of(process: BaseProcess) -> Role | None:
    """The part of a process in a start of vLLM, by the function that it runs."""
    return role_among(_ROLES, process)


def why_not(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """A reason against a child with the environment ``now``, from a process that has imported in ``before``."""
    changed = changed_variables(before, now)
    if "GOMP_CPU_AFFINITY" in changed and not now.get("GOMP_CPU_AFFINITY", "").isdigit():
        return f"libgomp binds its threads when it is loaded (GOMP_CPU_AFFINITY={now.get('GOMP_CPU_AFFINITY', '')})"
    return why_not_in(before, now, _MAY_DIFFER)


def mend(before: Mapping[str, str]) -> None:
    """Give what was computed from the environment ``before`` its value in that of this process."""
    from vllm import plugins

    changed = changed_variables(before, os.environ)
    # The copy was made while plugins were being loaded: those behind this one have not been.
    plugins.plugins_loaded = False
    if "GOMP_CPU_AFFINITY" in changed:
        os.sched_setaffinity(0, {int(os.environ["GOMP_CPU_AFFINITY"])})
    mend_torch(changed)


def _is_first_process() -> bool:
    """Whether this is the process of the command line: not one that it started, nor a program that has vLLM as a
    library.
    """
    if multiprocessing.parent_process() is not None or "vllm.entrypoints.cli.serve" not in sys.modules:
        return False
    return os.path.basename(sys.argv[0]) == "vllm" and sys.argv[1:2] == ["serve"]


def _platform() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_name)
