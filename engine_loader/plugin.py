"""What engines call when they start: it registers the load format, the hooks of the compile cache and those that note
the phases of a start, and does nothing else.

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
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from .report.events import recorder

logger = logging.getLogger(__name__)

LOAD_FORMAT = "b10_3fs"
_VLLM_CACHE = "engine_loader.engines.vllm.cache"
_SGLANG_CACHE = "engine_loader.engines.sglang.cache"
_STARTING = {
    "vllm.entrypoints.cli.serve": "engine_loader.engines.starting.vllm_processes",
    "sglang.srt.plugins": "engine_loader.engines.starting.sglang_processes",
}
"""Module that is there where an engine's server starts -> what may make the template of its processes."""
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
_VLLM_PHASES = "engine_loader.engines.vllm.start_phases"
_SGLANG_PHASES = "engine_loader.engines.sglang.start_phases"
PHASES = {
    "vllm.engine.arg_utils": f"{_VLLM_PHASES}:register_arguments",
    "vllm.model_executor.models.registry": f"{_VLLM_PHASES}:register_registry",
    "vllm.v1.engine.core_client": f"{_VLLM_PHASES}:register_client",
    "vllm.v1.engine.async_llm": f"{_VLLM_PHASES}:register_async_llm",
    "vllm.entrypoints.llm": f"{_VLLM_PHASES}:register_llm",
    "vllm.v1.executor.abstract": f"{_VLLM_PHASES}:register_executor",
    "vllm.v1.engine.core": f"{_VLLM_PHASES}:register_engine_core",
    "vllm.v1.worker.worker_base": f"{_VLLM_PHASES}:register_worker",
    "vllm.worker.worker_base": f"{_VLLM_PHASES}:register_worker",  # up to 0.11
    "vllm.model_executor.model_loader.base_loader": f"{_VLLM_PHASES}:register_base_loader",
    "vllm.v1.worker.gpu_model_runner": f"{_VLLM_PHASES}:register_model_runner",
    "vllm.v1.worker.gpu.model_runner": f"{_VLLM_PHASES}:register_new_model_runner",
    "vllm.compilation.decorators": f"{_VLLM_PHASES}:register_compilation",
    "vllm.compilation.wrapper": f"{_VLLM_PHASES}:register_compiler",
    "uvicorn.server": f"{_VLLM_PHASES}:register_server",
    "sglang.srt.entrypoints.engine": f"{_SGLANG_PHASES}:register_engine",
    "sglang.srt.entrypoints.http_server": f"{_SGLANG_PHASES}:register_http_server",
    "sglang.srt.managers.scheduler": f"{_SGLANG_PHASES}:register_scheduler",
    "sglang.srt.model_executor.model_runner": f"{_SGLANG_PHASES}:register_model_runner",
    "sglang.srt.model_loader.loader": f"{_SGLANG_PHASES}:register_loader",
    "torch._dynamo.callback": "engine_loader.engines.common.start.phase_wrappers:register_compilation",
}
"""As ``ADAPTERS``, of the hooks that note when the phases of a start begin and end; they change nothing."""
failures: dict[str, str] = {}
"""Adapter -> the error with which its registration failed in this process."""


def register() -> None:
    """Make the load format and the compile cache known to the engine of this process. Costs milliseconds, may be
    called again, never raises.
    """
    known = recorder.knows_process
    recorder.note_process()
    if not known:
        recorder.note_imports()
    _name_cache_directories()
    for module, adapter in (*ADAPTERS.items(), *PHASES.items()):
        try:
            _when_imported(module, adapter)
        except Exception:
            logger.exception("engine_loader could not prepare %s", adapter)
    for module, adapter in _STARTING.items():
        if module in sys.modules:
            _run(adapter)


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
        return
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
    adapters = _after_import.waiting.setdefault(module, [])
    if adapter not in adapters:
        adapters.append(adapter)


def _run(adapter: str) -> None:
    module, _, function = adapter.partition(":")
    try:
        getattr(importlib.import_module(module), function or "register")()
    except Exception as error:
        failures[adapter] = f"{type(error).__name__}: {error}"
        if adapter in PHASES.values():
            logger.debug("engine_loader could not note phases of the start: %s", adapter, exc_info=True)
            return
        # An engine that is used with another load format must start all the same.
        logger.exception(
            "engine_loader could not register the load format %s or its compile cache: %s; "
            "`engine-loader doctor` says more",
            LOAD_FORMAT,
            adapter,
        )


class _AfterImport:
    """A finder of ``sys.meta_path`` that runs adapters once, after the module that they extend was imported.

    One for all modules, since every import of the engine asks it. wrapt has such hooks, but importing it takes longer
    than all of ``register``; importlib.abc, which has the base class of finders, a third as long.

    Attributes:
        waiting: module -> its adapters.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, list[str]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        adapters = self.waiting.pop(fullname, None)
        if adapters is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            for adapter in adapters:
                _run(adapter)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


_after_import = _AfterImport()
