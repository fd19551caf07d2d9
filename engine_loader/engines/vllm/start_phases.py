"""vLLM: the phases of a start. Read in 0.10.1 to 0.33; what a version does not have is passed over.

- API process, or the program that makes an ``LLM``: ``EngineArgs.create_engine_config`` begins the account; the engine
  is ready when uvicorn listens, or when the ``LLM`` has been made.
- engine process: the executor and ``_initialize_kv_caches``. ``EngineCore.__init__`` has begun when plugins are called.
- worker processes: ``WorkerWrapperBase.init_device``, and on its worker what loads, compiles, warms up and captures.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from ...report import phases
from ...report.events import recorder
from ..common.start.phase_wrappers import around_function, never_raising, note_files, note_files_behind, record, watch

logger = logging.getLogger("vllm.engine_loader")

_made_at: list[float] = []
"""When this process had made an ``AsyncLLM``, in seconds of the monotonic clock, for the server that comes next."""
_SGLANG_SERVER = "sglang.srt.entrypoints.http_server"
_ON_WORKER = {
    "load_model": phases.MODEL_SETUP,
    "determine_available_memory": phases.WARM_UP,
    "initialize_from_config": phases.KV_CACHE,
    "compile_or_warm_up_model": phases.WARM_UP,
}


def register_arguments() -> None:
    """Begin the account of a start where the configuration is made."""
    from vllm.engine.arg_utils import EngineArgs

    def around(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
        _begin(self)
        with recorder.span(phases.CONFIGURATION):
            return original(self, *args, **options)

    around_function(EngineArgs, "create_engine_config", around)


@never_raising
def _begin(arguments: Any) -> None:
    sizes = {
        short: getattr(arguments, f"{name}_parallel_size", 1)
        for short, name in (("tp", "tensor"), ("pp", "pipeline"), ("dp", "data"))
    }
    from vllm import envs

    from ..common.start.start_account import begin
    from ..common.start.start_hints import PLAN_VARIABLE, keep_plan

    said = keep_plan(PLAN_VARIABLE in envs.environment_variables)
    if said is not None:
        logger.warning("%s", said)
    recorder.since_registered(phases.CONFIGURATION)
    begin("vllm", arguments.model, arguments.load_format, sizes, logger)
    recorder.name_process("API server")


@never_raising
def _ready() -> None:
    from ..common.start.start_account import ready

    ready(logger)


def register_registry() -> None:
    """Note the inspection of a model."""
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    record(_LazyRegisteredModel, "inspect_model_cls", phases.INSPECTION)


def register_client() -> None:
    """Note the wait for the engine's process."""
    from vllm.v1.engine.core_client import MPClient

    record(MPClient, "__init__", phases.ENGINE_PROCESS, waits=True)


def register_async_llm() -> None:
    """Note what the API server makes for itself, behind it too: its routes and handlers, until it listens."""
    from vllm.v1.engine.async_llm import AsyncLLM

    def around(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            with recorder.span(phases.SERVER):
                return original(*args, **options)
        finally:
            _made_at.append(time.monotonic())

    around_function(AsyncLLM, "__init__", around)


def register_llm() -> None:
    """An ``LLM`` is ready when it has been made."""
    from vllm.entrypoints.llm import LLM

    def around(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with recorder.span(phases.SERVER):
            result = original(*args, **options)
        _ready()
        return result

    around_function(LLM, "__init__", around)


def register_server() -> None:
    """A server is ready when it listens."""
    from uvicorn.server import Server

    async def around(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if _made_at:
            recorder.past_span(phases.SERVER, _made_at.pop(), time.monotonic())
        with recorder.span(phases.SERVER):
            result = await original(*args, **options)
        if _SGLANG_SERVER not in sys.modules:  # it warms up behind that
            _ready()
        return result

    around_function(Server, "startup", around)


def register_executor() -> None:
    """Note the wait for the workers' processes."""
    from vllm.v1.executor.abstract import Executor

    def around(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        _begin_engine_core()
        with recorder.span(phases.WORKER_PROCESSES, waits=True):
            return original(*args, **options)

    around_function(Executor, "__init__", around)


@never_raising
def _begin_engine_core() -> None:
    # The plugin is called within EngineCore.__init__, which makes the executor.
    recorder.since_registered(phases.ENGINE_SETUP)
    recorder.name_process("engine core")
    watch(logger)


def register_engine_core() -> None:
    """Note what the engine's process does."""
    from vllm.v1.engine import core

    after: list[int] = []

    def around(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with recorder.span(phases.WORKERS_AT_WORK, waits=True):
            result = original(*args, **options)
        after.append(recorder.begin(phases.ENGINE_SETUP))
        return result

    def run(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        while after:
            recorder.end(after.pop())
        note_files()
        return original(*args, **options)

    around_function(core.EngineCore, "_initialize_kv_caches", around)
    for kind in ("EngineCoreProc", "DPEngineCoreProc"):
        around_function(getattr(core, kind, None), "run_busy_loop", run)


def register_worker() -> None:
    """Note what a worker does."""
    try:
        from vllm.v1.worker.worker_base import WorkerWrapperBase
    except ImportError:  # up to 0.11
        from vllm.worker.worker_base import WorkerWrapperBase

    def around(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
        _begin_worker(self)
        with recorder.span(phases.DEVICE):
            return original(self, *args, **options)

    around_function(WorkerWrapperBase, "init_device", around)


@never_raising
def _begin_worker(wrapper: Any) -> None:
    # The plugin is called within init_worker, which makes the worker.
    in_engine = recorder.role.startswith("engine core")  # a single rank on a GPU needs no process of its own
    if not in_engine:
        recorder.since_registered(phases.WORKER_SETUP)
    rank = getattr(wrapper.worker, "rank", getattr(wrapper, "rpc_rank", 0))
    recorder.name_process("engine core and worker" if in_engine else "worker", rank)
    watch(logger)
    for name, phase in _ON_WORKER.items():
        record(wrapper.worker, name, phase)
    note_files_behind(wrapper.worker, "compile_or_warm_up_model")


def register_base_loader() -> None:
    """Note the parts of loading a model, whatever its load format."""
    from vllm.model_executor.model_loader import base_loader

    def load(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
        never_raising(record)(self, "load_weights", phases.WEIGHTS)
        return original(self, *args, **options)

    around_function(base_loader.BaseModelLoader, "load_model", load)
    record(base_loader, "initialize_model", phases.MODEL_CREATION)
    record(base_loader, "process_weights_after_loading", phases.AFTER_WEIGHTS)


def register_model_runner() -> None:
    """Note the capture of CUDA graphs."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    record(GPUModelRunner, "profile_cudagraph_memory", phases.GRAPH_ESTIMATE)
    record(GPUModelRunner, "capture_model", phases.GRAPH_CAPTURE)


def register_new_model_runner() -> None:
    """Note the capture of CUDA graphs by vLLM's second model runner."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    record(GPUModelRunner, "profile_cudagraph_memory", phases.GRAPH_ESTIMATE)
    record(GPUModelRunner, "capture_model", phases.GRAPH_CAPTURE)


def register_compilation() -> None:
    """Note that compiled code is loaded from vLLM's cache."""
    from vllm.compilation import decorators

    record(decorators, "_try_load_aot_compiled_fn", phases.COMPILED_CODE)


def register_compiler() -> None:
    """Note what is compiled ahead of time, of which torch.compile's callbacks do not tell."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    record(TorchCompileWithNoGuardsWrapper, "aot_compile", phases.COMPILE)
