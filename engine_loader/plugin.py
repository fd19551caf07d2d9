"""What engines call when they start: it registers the load format and the hooks of the compile cache, and does
nothing else.

vLLM calls ``register`` in every process, before arguments are parsed, and dies when it raises; SGLang does, too, and
only logs it. So it imports no engine and no torch: an engine's adapter is imported when the engine itself imports the
module that the adapter extends.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)

LOAD_FORMAT = "b10_3fs"
_VLLM_CACHE = "engine_loader.engines.vllm.cache"
_SGLANG_CACHE = "engine_loader.engines.sglang.cache"
_STARTED_BY, _STARTING = "vllm.entrypoints.cli.serve", "engine_loader.engines.starting.vllm_processes"
_SGLANG_FORMAT = "engine_loader.engines.sglang.format"
ADAPTERS = {
    "vllm.model_executor.model_loader": "engine_loader.engines.vllm.loader",
    "vllm.model_executor.models.registry": f"{_VLLM_CACHE}:register_registry",
    "vllm.engine.arg_utils": "engine_loader.engines.vllm.headers",
    "vllm.model_executor.model_loader.weight_cache.daemon": "engine_loader.engines.vllm.preload",
    "vllm.v1.executor.abstract": f"{_VLLM_CACHE}:register_executor",
    "vllm.v1.engine.core": f"{_VLLM_CACHE}:register_engine_core",
    "vllm.distributed.elastic_ep.elastic_state": f"{_VLLM_CACHE}:register_elastic",
    "vllm.v1.worker.worker_base": f"{_VLLM_CACHE}:register_worker",
    "vllm.worker.worker_base": f"{_VLLM_CACHE}:register_worker",  # up to 0.11
    "vllm.compilation.decorators": "engine_loader.engines.vllm.fixups",
    "sglang.srt.server_args": f"{_SGLANG_FORMAT}:register_choice",
    "sglang.srt.configs.load_config": f"{_SGLANG_FORMAT}:register_load_config",
    "sglang.srt.model_loader.loader": "engine_loader.engines.sglang.loader",
    "sglang.srt.entrypoints.engine": f"{_SGLANG_CACHE}:register_engine",
    "sglang.srt.entrypoints.http_server": f"{_SGLANG_CACHE}:register_http_server",
    "sglang.srt.managers.scheduler": f"{_SGLANG_CACHE}:register_scheduler",
    "torch._inductor.codecache": "engine_loader.engines.common.torch_fixups",
}
"""Module of an engine or of torch -> the adapter whose ``register()``, or the function behind the colon, is called once
that module is imported.
"""
failures: dict[str, str] = {}
"""Adapter -> the error with which its registration failed in this process."""


def register() -> None:
    """Make the load format and the compile cache known to the engine of this process. Costs milliseconds, may be
    called again, never raises.
    """
    _name_cache_directories()
    for module, adapter in ADAPTERS.items():
        try:
            _when_imported(module, adapter)
        except Exception:
            logger.exception("engine_loader could not prepare %s", adapter)
    if _STARTED_BY in sys.modules:
        _run(_STARTING)


def _name_cache_directories() -> None:
    """Name caches that would not be found again otherwise.

    TRITON_CACHE_DIR is set to Triton's own default: else inductor points Triton to another directory in mid-process.
    CUTE_DSL_CACHE_DIR is by default below the temporary directory, which a new container does not have; CuTe DSL raises
    where it cannot make its directory, so it is set only where it can. Each is left as it is where it is set.
    """
    home = os.path.expanduser("~")
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(os.environ.get("TRITON_HOME") or home, ".triton", "cache"))
    cute = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"), "cute_dsl")
    if not os.environ.get("CUTE_DSL_CACHE_DIR") and _can_be_made(cute):
        os.environ["CUTE_DSL_CACHE_DIR"] = cute


def _can_be_made(path: str) -> bool:
    """Whether this user can make the directory ``path``, or write to it if it exists."""
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def _when_imported(module: str, adapter: str) -> None:
    if module in sys.modules:
        _run(adapter)
    elif not any(isinstance(finder, _AfterImport) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(module, lambda: _run(adapter)))


def _run(adapter: str) -> None:
    module, _, function = adapter.partition(":")
    try:
        getattr(importlib.import_module(module), function or "register")()
    except Exception as error:
        failures[adapter] = f"{type(error).__name__}: {error}"
        # An engine that is used with another load format must start all the same.
        logger.exception(
            "engine_loader could not register the load format %s or its compile cache: %s; "
            "`engine-loader doctor` says more",
            LOAD_FORMAT,
            adapter,
        )


class _AfterImport:
    """A finder of ``sys.meta_path`` that calls ``then`` once, after ``module`` was imported.

    wrapt has such hooks, but importing it takes longer than all of ``register``; importlib.abc, which has the base
    class of finders, a third as long.
    """

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module = module
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute, then = spec.loader.exec_module, self._then

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            then()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
