"""vLLM: when compile caches are restored and saved. Holds for 0.10.1 to 0.33.

- engine process, ``Executor.__init__``: the restore starts, beside the start of workers and the loading of weights;
  ``EngineCore._initialize_kv_caches`` waits for it, and when that returns, every rank has warmed up: the save starts.
- worker process: ``determine_available_memory`` and ``compile_or_warm_up_model`` wait for the node's restore, since a
  follower of a multi-node engine (--headless) has no engine process, and Ray's workers may be on nodes of their own.
- API process: ``_LazyRegisteredModel.inspect_model_cls`` restores vLLM's descriptions of models, which saves it a
  process.
- ranks that join a running engine (elastic expert parallelism) warm up after ``_initialize_kv_caches``: the save waits
  for that.
- ``vllm snapshot create`` captures all processes of an engine: there each save is waited for.

No hook raises an exception of its own, and none waits for longer than compile_cache.restore_timeout_s.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...compile_cache.directories import VLLM_MODEL_INFOS, directories_of
from ...compile_cache.host.versions import module_version, python_version
from ...compile_cache.key import CacheKey, environment_key
from ...compile_cache.process.job import Job
from ...compile_cache.process.session import Running, run_job
from ...compile_cache.process.use import note_use
from ...compile_cache.verdict.factors import without_secrets
from ...escaping import printable
from ...replacing import is_wrapped, wrap
from ...settings import CompileCacheSettings
from ..common.cache_hooks import (
    Begun,
    NodeSession,
    await_in_foreground,
    cache_settings,
    quietly,
    restore_begun,
    save_in_foreground,
    scope_of,
    start_save_of_node,
    tell_wait,
    use_private_directories,
    wait_for_node,
    watched,
)
from ..common.start.restored_last import note_restored

# Below vLLM's own logger, so that it is shown in vLLM's way and at vLLM's level.
logger = logging.getLogger("vllm.engine_loader")

_ENGINE = "vllm"
_SESSION = "_engine_loader_session"
_MODEL_INFOS_TIMEOUT_S = 10.0
_WORKER_METHODS = ("determine_available_memory", "compile_or_warm_up_model")
_RPC, _JOINED = "_collective_rpc", ("warmup_new_worker", "warmup_local_kernels")  # the second up to 0.29
_SNAPSHOT = "vllm.snapshot.server"
_quietly = functools.partial(quietly, logger)


def key_of(vllm_config: Any, settings: CompileCacheSettings) -> CacheKey:
    """The key of an engine: this machine, and by default its model and parallel layout."""
    parallel, sizes, scope = vllm_config.parallel_config, _sizes(vllm_config), _scope(vllm_config, settings)
    local_engines = getattr(parallel, "data_parallel_size_local", 1) or 1
    devices = (getattr(parallel, "local_world_size", None) or sizes["tp"] * sizes["pp"]) * local_engines
    return environment_key({"vllm": module_version("vllm")}, scope, devices=devices)


def _scope(vllm_config: Any, settings: CompileCacheSettings) -> str:
    model = vllm_config.model_config
    return scope_of(settings, str(model.model), getattr(model, "revision", None), _sizes(vllm_config))


def _sizes(vllm_config: Any) -> dict[str, int]:
    parallel = vllm_config.parallel_config
    return {
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "dp": parallel.data_parallel_size,
    }


def model_infos_key() -> CacheKey:
    """The key of the descriptions of models. They hold on any machine: vLLM checks each against the model's source."""
    return CacheKey((("vllm", module_version("vllm")), ("python", python_version())), "model-infos")


def register_executor() -> None:
    """Start a restore when an executor is made."""
    use_private_directories(_ENGINE, logger)
    from vllm.v1.executor.abstract import Executor

    # The first of the processes that are captured; those of the engine inherit what it sets.
    if getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None) == _SNAPSHOT:
        save_in_foreground()

    def start(original: Callable[..., Any], self: Any, vllm_config: Any, *args: Any, **options: Any) -> Any:
        session = _quietly(_start, vllm_config)
        if session is not None:
            object.__setattr__(self, _SESSION, session)
        with watched(session, logger):
            return original(self, vllm_config, *args, **options)

    wrap(Executor, "__init__", start)


def register_engine_core() -> None:
    """Wait for the restore before the first compilation, and save after warm-up."""
    from vllm.v1.engine.core import EngineCore

    def around(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
        session = getattr(getattr(self, "model_executor", None), _SESSION, None)
        if session is None:  # an executor of another kind
            session = _quietly(_start, self.vllm_config)
        if session is not None:
            _quietly(tell_wait, logger, session.wait)
        with watched(session, logger):
            result = original(self, *args, **options)
        if session is not None and not _warms_up_later():
            _quietly(session.save)
        return result

    wrap(EngineCore, "_initialize_kv_caches", around)


def register_elastic() -> None:
    """Save what an engine that joins another compiles when it has warmed up."""
    from vllm.distributed.elastic_ep.elastic_state import ElasticEPScalingState

    def around(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        told = (*args, *options.get("args", ()))
        if any(name in told for name in _JOINED) and _warms_up_later():
            _quietly(_save_joined, self)
        return result

    if hasattr(ElasticEPScalingState, _RPC):
        wrap(ElasticEPScalingState, _RPC, around)


def _save_joined(scaling: Any) -> None:
    session = getattr(scaling.engine_core.model_executor, _SESSION, None)
    if session is not None:
        session.save()


def _warms_up_later() -> bool:
    """Whether this engine was started to join another: then vLLM warms it up after it has made its caches."""
    return os.environ.get("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", "0") not in ("", "0")


def register_worker() -> None:
    """Let workers wait for the restore of their node."""
    use_private_directories(_ENGINE, logger)
    try:
        from vllm.v1.worker.worker_base import WorkerWrapperBase
    except ImportError:  # up to 0.11
        from vllm.worker.worker_base import WorkerWrapperBase

    def around(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
        session = _quietly(_start_alone, self.vllm_config)
        result = original(self, *args, **options)
        _quietly(_watch, self.worker, self.vllm_config, session)
        return result

    wrap(WorkerWrapperBase, "init_device", around)


def register_registry() -> None:
    """Restore vLLM's description of a model where it would start a process to make it."""
    use_private_directories(_ENGINE, logger)
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    if not hasattr(_LazyRegisteredModel, "_get_cache_filename"):
        return  # before there was such a cache

    def around(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
        missing: Path | None = _quietly(_restore_model_info, self)
        result = original(self, *args, **options)
        if missing is not None:
            _quietly(_save_model_info, missing)
        return result

    wrap(_LazyRegisteredModel, "inspect_model_cls", around)


def _start(vllm_config: Any) -> NodeSession | None:
    settings = cache_settings()
    if not settings.enabled:
        return None
    core = sys.modules.get("vllm.v1.engine.core")
    # In a version of vLLM with another engine core nothing would tell that the engine is ready.
    told = core is None or is_wrapped(getattr(core, "EngineCore", None), "_initialize_kv_caches")
    layout = _sizes(vllm_config)
    return NodeSession(_ENGINE, key_of(vllm_config, settings), settings, logger, layout, on_trial=told)


def _start_alone(vllm_config: Any) -> NodeSession | None:
    """Start a restore, unless another process of this node began one."""
    return None if restore_begun(_ENGINE) is not None else _start(vllm_config)


def _watch(worker: Any, vllm_config: Any, session: NodeSession | None) -> None:
    """Wrap the methods of a worker that compile: each waits for the restore first, and behind the last one a worker
    without an engine process saves, by itself or with the others of its node.
    """
    settings = cache_settings()
    if not settings.enabled:
        return
    begun = session.begun if session is not None else restore_begun(_ENGINE)
    if begun is None:  # the restore could not be begun
        begun = Begun(time.time_ns(), key_of(vllm_config, settings))
    began_ns = begun.since_ns
    wait = session.wait if session is not None else functools.partial(wait_for_node, _ENGINE, settings, began_ns)
    ranks = getattr(vllm_config.parallel_config, "local_world_size", 1)

    def around(name: str, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        _quietly(tell_wait, logger, wait)
        result = original(*args, **options)
        if name == _WORKER_METHODS[-1]:
            _quietly(_note_use, vllm_config, settings, began_ns)
            if session is not None:
                _quietly(session.save)
            elif _is_follower(vllm_config):
                _quietly(start_save_of_node, _ENGINE, begun, settings, ranks, logger)
        return result

    for name in _WORKER_METHODS:
        if getattr(worker, name, None) is not None:
            wrap(worker, name, functools.partial(around, name))


def _is_follower(vllm_config: Any) -> bool:
    """True for the workers of a node that has no engine process."""
    parallel = vllm_config.parallel_config
    within = getattr(parallel, "node_rank_within_dp", None)  # a data-parallel engine begins on each node: 0
    return bool(getattr(parallel, "node_rank", 0) if within is None else within)


def _note_use(vllm_config: Any, settings: CompileCacheSettings, began_ns: int) -> None:
    """Record this rank's directories of vLLM's cache, which are saved even if nothing in them is new, and the factors
    of vLLM's key.
    """
    root = directories_of("vllm")["vllm"]
    config, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    found = {str(getattr(config, name, "") or "") for name in ("cache_dir", "local_cache_dir")}
    found.add(os.path.dirname(inductor) if os.path.basename(inductor) == "inductor_cache" else inductor)
    rank = f"rank_{parallel.rank}_{getattr(parallel, 'data_parallel_index', parallel.data_parallel_rank)}"
    note_use(
        root,
        rank,
        [path for path in found if path.startswith(f"{root}/")],
        _quietly(key_factors, vllm_config) or {},
        engine=began_ns,
        scope=_scope(vllm_config, settings),
    )


def key_factors(vllm_config: Any) -> dict[str, Any]:
    """The variables, hashes of configurations and model path that go into vLLM's own keys, to explain a miss."""
    from vllm import envs

    factors = getattr(envs, "compile_factors", None)
    named = factors() if factors is not None else {k: v for k, v in os.environ.items() if k.startswith("VLLM_")}
    configs = {}
    for name, value in vars(vllm_config).items():
        compute = getattr(value, "compute_hash", None)
        if compute is not None:
            configs[name] = str(_quietly(compute))
    return {"env": without_secrets(named), "config": configs, "model": str(vllm_config.model_config.model)}


def _restore_model_info(model: Any) -> Path | None:
    """Restore the description of a model from the store, if vLLM's file with it does not exist.

    Returns:
        The path of the file if it is still missing; None if it exists now, or if the compile cache is switched off.
    """
    path = Path(model._get_cache_dir(), model._get_cache_filename())
    if path.exists():
        return None
    settings = cache_settings()
    if not settings.enabled:
        return None
    job = _model_infos_job("restore", settings)
    outcome = run_job(job, min(_MODEL_INFOS_TIMEOUT_S, settings.restore_timeout_s))
    note_restored(outcome, settings)
    for message in outcome.messages:
        logger.warning("compile cache: %s", printable(message))
    if path.exists():
        logger.info("compile cache: restored vLLM's description of the model in %.1f s", outcome.seconds)
        return None
    return path


def _save_model_info(path: Path) -> None:
    settings = cache_settings()
    if path.exists() and not settings.read_only:
        await_in_foreground(Running(_model_infos_job("save", settings), settings, settings.save_timeout_s), settings)


def _model_infos_job(action: Any, settings: CompileCacheSettings) -> Job:
    directories = {VLLM_MODEL_INFOS.name: str(VLLM_MODEL_INFOS.directory())}
    return Job(
        action,
        "vllm",
        model_infos_key(),
        directories,
        model_infos=True,
        background=action == "save",
        settings=settings.model_dump(mode="json"),
    )
