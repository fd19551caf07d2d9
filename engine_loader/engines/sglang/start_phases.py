"""SGLang: the phases of a start. Read in 0.5.9 to 0.5.23; what a version does not have is passed over.

- server process: ``Engine._launch_subprocesses`` begins the account; the engine is ready when ``_wait_and_warmup`` has
  had its first answers, or when an ``Engine`` without a server has been made.
- scheduler processes, one a rank: ``Scheduler.__init__``, and within it what ``ModelRunner`` loads and captures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ...report import phases
from ...report.events import recorder
from ..common.start.phase_wrappers import around_function, never_raising, note_files, record, watch

logger = logging.getLogger(__name__)

_SIZES = {"tp": "tp_size", "pp": "pp_size", "dp": "dp_size"}


def register_engine() -> None:
    """Begin the account of a start where a node's processes are started."""
    from sglang.srt.entrypoints import engine

    def launch(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        _begin(next((value for value in (*args, *options.values()) if hasattr(value, "load_format")), None))
        with recorder.span(phases.ENGINE_PROCESS, waits=True):
            return original(*args, **options)

    def make(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        _ready()

    # Up to 0.5.9 it was a function of the module.
    around_function(
        engine if hasattr(engine, "_launch_subprocesses") else engine.Engine, "_launch_subprocesses", launch
    )
    around_function(engine.Engine, "__init__", make)


@never_raising
def _begin(server_args: Any) -> None:
    from ..common.start.start_account import begin

    recorder.since_registered(phases.CONFIGURATION)
    sizes = {short: getattr(server_args, name, 1) for short, name in _SIZES.items()}
    begin("sglang", server_args.model_path, server_args.load_format, sizes, logger)
    recorder.name_process("server")


@never_raising
def _ready() -> None:
    from ..common.start.start_account import ready

    ready(logger)


def register_http_server() -> None:
    """The server is ready behind its warm-up."""
    from sglang.srt.entrypoints import http_server

    def around(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with recorder.span(phases.WARM_UP):
            result = original(*args, **options)
        _ready()
        return result

    around_function(http_server, "_wait_and_warmup", around)


def register_scheduler() -> None:
    """Note what a scheduler does."""
    from sglang.srt.managers.scheduler import Scheduler

    def make(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> None:
        _name_scheduler(*args, **options)
        with recorder.span(phases.ENGINE_SETUP):
            original(self, *args, **options)
        note_files()

    around_function(Scheduler, "__init__", make)
    record(Scheduler, "init_model_worker", phases.WORKER_SETUP)


@never_raising
def _name_scheduler(*args: Any, **options: Any) -> None:
    # Scheduler(server_args, port_args, gpu_id, tp_rank, …): the rank within the tensor-parallel group.
    rank = options.get("tp_rank", args[3] if len(args) > 3 else None)
    recorder.name_process("scheduler", rank if isinstance(rank, int) else None)
    watch(logger)


def register_model_runner() -> None:
    """Note what loads the model, makes its memory and captures graphs."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    record(ModelRunner, "init_torch_distributed", phases.DEVICE)
    record(ModelRunner, "load_model", phases.MODEL_SETUP)
    for name in ("init_memory_pool", "alloc_memory_pool"):
        record(ModelRunner, name, phases.KV_CACHE)
    record(ModelRunner, "kernel_warmup", phases.WARM_UP)
    for name in ("init_device_graphs", "init_cuda_graphs", "init_decode_cuda_graph", "init_prefill_cuda_graph"):
        record(ModelRunner, name, phases.GRAPH_CAPTURE)


def register_loader() -> None:
    """Note the parts of loading a model."""
    from sglang.srt.model_loader import loader

    record(loader, "_initialize_model", phases.MODEL_CREATION)
    record(loader.DefaultModelLoader, "load_weights_and_postprocess", phases.WEIGHTS)
