"""SGLang's processes: schedulers and the detokenizer are forked from a copy of the server's first process.

The plugin registers there before arguments are parsed (``sglang.launch_server``, ``sglang serve``): there is no event
loop, no engine, no accelerator in use yet, and little of SGLang is imported; the copy imports what schedulers need
while the first process imports what the server needs. Facts: SGLang 0.5.23, ``sglang/srt/entrypoints/engine.py``
(``_set_envs_and_config``, ``_launch_scheduler_processes``), ``sglang/srt/plugins``. Versions before 0.5.11 have no
plugins, and are left as they are.
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

logger = logging.getLogger("sglang.engine_loader")

_ROLES = {
    ("sglang.srt.managers.scheduler", "run_scheduler_process"): Role(makes_others=False),
    ("sglang.srt.managers.detokenizer_manager", "run_detokenizer_process"): Role(makes_others=False),
    ("sglang.srt.managers.data_parallel_controller", "run_data_parallel_controller_process"): Role(makes_others=True),
}
_IMPORTS = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.model_loader.loader",
    "sglang.srt.models.registry",
)

_MAY_DIFFER = re.compile(
    # Read when they are used: by libraries that are not loaded yet, by sglang.srt.environ, by this package.
    "NCCL_.*|CUDA_DEVICE_MAX_CONNECTIONS|TRTLLM_ENABLE_PDL|CUTE_DSL_.*|SGLANG_.*|PROMETHEUS_MULTIPROC_DIR|TLLM_LOG_LEVEL"
    # What an import in the first process sets, it sets in the copy, too.
    "|DG_JIT_.*"
    "|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|OLDPWD|PWD|_|SHLVL|_?ENGINE_LOADER_.*"
    # Seen to in the child: by ``mend``, or by a reason against it.
    "|TORCHINDUCTOR_COMPILE_THREADS|TORCHINDUCTOR_CPP_DYNAMIC_THREADS|OMP_NUM_THREADS|LD_PRELOAD"
)


def register() -> None:
    """Make the template where this is the first process of a server and the settings ask for it."""
    # auto acts where it is proved over all that the tests have, and this is not.
    if not _is_first_process() or template_setting() != "on":
        return
    reason = begin(Plan(role_of, why_not, _IMPORTS, mend, logger))
    if reason is not None:
        logger.info("start.template: processes of this start are spawned: %s", reason)


def role_of(process: BaseProcess) -> Role | None:
    """The part of a process in a start of SGLang, by the function that it runs."""
    return role_among(_ROLES, process)


def why_not(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """A reason against a child with the environment ``now``, from a process that has imported in ``before``."""
    return why_not_in(before, now, _MAY_DIFFER)


def mend(before: Mapping[str, str]) -> None:
    """Give what was computed from the environment ``before`` its value in that of this process."""
    from sglang.srt import plugins

    # The copy was made while plugins were being loaded: those behind this one have not been.
    plugins._plugins_loaded = False
    mend_torch(changed_variables(before, os.environ))


def _is_first_process() -> bool:
    """Whether this is the process of the command line: not one that it started, nor a program that has SGLang as a
    library.
    """
    # While a child is unpickled, where this package registers, it has its name, and no parent yet.
    if multiprocessing.parent_process() is not None or multiprocessing.current_process().name != "MainProcess":
        return False
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name == "sglang.launch_server":
        return True
    return os.path.basename(sys.argv[0]) == "sglang" and sys.argv[1:2] == ["serve"]
