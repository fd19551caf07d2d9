"""SGLang: when compile caches are restored and saved. Read in 0.5.9 to 0.5.23.

- The process that starts the others of its node (``Engine._launch_subprocesses``) begins the restore, beside their
  start and their imports.
- Each scheduler, one a rank, waits for it in ``init_model_worker``: within, kernels are compiled and graphs captured.
  On nodes other than the first, where no process sees the warm-up, the last scheduler saves behind it.
- On the first node, ``_wait_and_warmup`` sends the server its first requests; when they were answered, the save starts.
  An ``Engine`` without a server saves when it has been made, a server of several processes when its schedulers are up.
- Schedulers that something else has started restore and save by themselves.

No hook raises an exception of its own, but for the check of the load format.
"""

from __future__ import annotations

import functools
import logging
import os
import pkgutil
import re
import sys
import time
from typing import Any

from ...compile_cache.directories import directories_of
from ...compile_cache.host.versions import module_version
from ...compile_cache.key import CacheKey, environment_key
from ...compile_cache.process.use import note_use
from ...compile_cache.verdict.factors import without_secrets
from ...replacing import is_wrapped, wrap
from ...settings import CompileCacheSettings
from ..common.cache_hooks import (
    Begun,
    NodeSession,
    cache_settings,
    quietly,
    restore_begun,
    scope_of,
    start_save,
    start_save_of_node,
    tell_wait,
    use_private_directories,
    wait_for_node,
    watched,
)
from .format import check

logger = logging.getLogger(__name__)

_ENGINE = "sglang"
_SCHEDULER = "sglang.srt.managers.scheduler"
_SERVER = "sglang.srt.entrypoints.http_server"
_SHAPES_KERNELS = re.compile(
    "dtype|quantization$|backend|attention|cuda_graph|compile|chunk|page_size|context_length|max_running_requests|"
    "speculative|moe|lora|mamba|deterministic|^enable_|^disable_"
)
_KERNEL_VARIABLE = re.compile("SGLANG_(?!.*(DIR|PATH|PORT|HOST|ADDR|LOG|TIMEOUT|RUN_ID))")
_quietly = functools.partial(quietly, logger)


def register_engine() -> None:
    """Check the load format and start the restore where a node's processes are started."""
    use_private_directories(_ENGINE, logger)
    from sglang.srt.entrypoints import engine

    def launch(original: Any, *args: Any, **options: Any) -> Any:
        server_args = next(value for value in (*args, *options.values()) if hasattr(value, "load_format"))
        check(server_args)
        session = _quietly(_start, server_args)
        with watched(session, logger):
            result = original(*args, **options)
        if getattr(server_args, "tokenizer_worker_num", 1) > 1:  # its warm-up is in processes without plugins
            _quietly(_save, server_args)
        return result

    def make(original: Any, self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        _quietly(_save, self.server_args)

    # Up to 0.5.9 it was a function of the module.
    wrap(engine if hasattr(engine, "_launch_subprocesses") else engine.Engine, "_launch_subprocesses", launch)
    wrap(engine.Engine, "__init__", make)


def register_scheduler() -> None:
    """Let the schedulers wait for the restore of their node."""
    use_private_directories(_ENGINE, logger)
    from sglang.srt.managers.scheduler import Scheduler

    def around(original: Any, self: Any, *args: Any, **options: Any) -> Any:
        alone = _quietly(_wait, self.server_args)
        result = original(self, *args, **options)
        _quietly(_note_use, self)
        if alone:
            _quietly(_save, self.server_args)
        elif self.server_args.node_rank:  # no server runs on it
            _quietly(_save_of_node, self.server_args)
        return result

    wrap(Scheduler, "init_model_worker", around)


def register_http_server() -> None:
    """Save behind the server's warm-up."""
    from sglang.srt.entrypoints import http_server

    def around(original: Any, server_args: Any, *args: Any, **options: Any) -> Any:
        result = original(server_args, *args, **options)
        if _is_up(http_server):
            _quietly(_save, server_args)
        return result

    wrap(http_server, "_wait_and_warmup", around)


def key_of(server_args: Any, settings: CompileCacheSettings) -> CacheKey:
    """The key of an engine: this machine, and by default its model and parallel layout."""
    scope = _scope(server_args, settings)
    return environment_key({"sglang": module_version("sglang")}, scope, devices=_ranks_of_node(server_args))


def _ranks_of_node(server_args: Any) -> int:
    sizes = _sizes(server_args)
    # With attention in data parallel, the replicas share the devices of the tensor-parallel ranks.
    replicas = 1 if _dp_attention(server_args) else sizes["dp"]
    return int(sizes["tp"] * sizes["pp"] * replicas // max(1, server_args.nnodes))


def _scope(server_args: Any, settings: CompileCacheSettings) -> str:
    revision = getattr(server_args, "revision", None)
    return scope_of(settings, str(server_args.model_path), revision, _sizes(server_args))


def _sizes(server_args: Any) -> dict[str, int]:
    return {"tp": server_args.tp_size, "pp": server_args.pp_size, "dp": server_args.dp_size}


def _dp_attention(server_args: Any) -> bool:
    return bool(getattr(server_args, "enable_dp_attention", False))


def _start(server_args: Any) -> NodeSession | None:
    settings = cache_settings()
    if not settings.enabled:
        return None
    good = _check_hooks()
    layout = _sizes(server_args) | {"dp_attention": _dp_attention(server_args)}
    return NodeSession(_ENGINE, key_of(server_args, settings), settings, logger, layout, on_trial=good)


def _check_hooks() -> bool:
    """Return whether every hook is in force, and log an error for each that is not: without it the cache is not
    restored in time, or not saved.
    """
    good = True
    for module, path in ((_SCHEDULER, "Scheduler.init_model_worker"), (_SERVER, "_wait_and_warmup")):
        if module in sys.modules and not _in_force(module, path):
            good = False
            logger.error(
                "compile cache: engine_loader's hook on %s.%s of SGLang %s is not in force, so that the cache is not "
                "restored in time or not saved: another plugin replaced it (SGLANG_PLUGINS=b10_3fs loads this one "
                "alone), or this version is not known; ENGINE_LOADER_COMPILE_CACHE__ENABLED=false switches it off",
                module,
                path,
                module_version("sglang"),
            )
    return good


def _in_force(module: str, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    if not is_wrapped(pkgutil.resolve_name(f"{module}:{owner}") if owner else sys.modules[module], name):
        return False
    registry = sys.modules.get("sglang.srt.plugins.hook_registry")
    others = registry.HookRegistry._hooks.get(f"{module}.{path}", ()) if registry is not None else ()
    return not any(kind.name == "REPLACE" for kind, *_ in others)


def _wait(server_args: Any) -> bool:
    """Return when the node's restore is done; True if no other process of this node began one, so that this one did."""
    settings = cache_settings()
    if not settings.enabled:
        return False
    begun = restore_begun(_ENGINE)
    if begun is not None:
        tell_wait(logger, functools.partial(wait_for_node, _ENGINE, settings, begun.since_ns))
        return False
    session = _start(server_args)
    if session is not None:
        tell_wait(logger, session.wait)
    return session is not None


def _save(server_args: Any) -> None:
    settings = cache_settings()
    if settings.enabled:
        begun = restore_begun(_ENGINE) or Begun(time.time_ns(), key_of(server_args, settings))
        start_save(_ENGINE, begun.key, settings, begun.since_ns, logger)


def _save_of_node(server_args: Any) -> None:
    settings = cache_settings()
    begun = restore_begun(_ENGINE)
    if settings.enabled and begun is not None:
        start_save_of_node(_ENGINE, begun, settings, _ranks_of_node(server_args), logger)


def _note_use(scheduler: Any) -> None:
    """Record that a rank ran, and the options that its kernels depend on: SGLang has no key made of them."""
    settings = cache_settings()
    if settings.enabled:
        ranks = (getattr(scheduler, name, None) or 0 for name in ("tp_rank", "pp_rank", "dp_rank"))
        label = "rank_" + "_".join(map(str, ranks))
        root, arguments = directories_of(_ENGINE)[_ENGINE], scheduler.server_args
        scope, begun = _scope(arguments, settings), restore_begun(_ENGINE)
        note_use(root, label, (), key_factors(arguments), engine=begun.since_ns if begun else None, scope=scope)


def key_factors(server_args: Any) -> dict[str, Any]:
    """The options and variables that may decide which kernels are compiled, to explain a miss."""
    names = getattr(type(server_args), "__struct_fields__", None) or vars(server_args)
    options = {name: getattr(server_args, name) for name in names if _SHAPES_KERNELS.search(name)}
    environment = {name: value for name, value in os.environ.items() if _KERNEL_VARIABLE.match(name)}
    return {
        "env": without_secrets(environment),
        "server_args": without_secrets({name: value for name, value in options.items() if _is_plain(value)}),
    }


def _is_plain(value: Any) -> bool:
    """True for a number, a bool, None, a printable string without braces, or a list of these; False for a document."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return (
        value is None
        or isinstance(value, (bool, int, float))
        or (isinstance(value, str) and value.isprintable() and "{" not in value)
    )


def _is_up(http_server: Any) -> bool:
    """True if the server has answered its first requests."""
    manager = getattr(http_server._global_state, "tokenizer_manager", None)
    return getattr(getattr(manager, "server_status", None), "name", None) == "Up"
