"""The functions of b10_transfer, by their names: `import engine_loader as b10_transfer` serves a model.py with
torch.compile as it is.

They cache what torch.compile makes (inductor and Triton) under the environment's key, never raise for what can go
wrong with a cache, and never take longer than compile_cache.restore_timeout_s and save_timeout_s. Their variables
(B10FS_CACHE_DIR, MAX_CACHE_SIZE_MB, …) and their defaults count; docs/compatibility.md has what differs.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ..compile_cache.cache_errors import CacheError, CacheOperationInterrupted, CacheValidationError
from ..compile_cache.directories import INDUCTOR, TRITON, default_inductor_directory, directories_of
from ..compile_cache.key import CacheKey, environment_key
from ..compile_cache.packs.scan import scan
from ..compile_cache.space import Floor, no_room_is_an_interruption
from ..compile_cache.stores.opening import open_store
from ..settings import CompileCacheSettings
from .b10_jobs import run_drop_in
from .b10_logger import get_b10_logger
from .b10_settings import drop_in_settings, room_for
from .vllm_sidecar import save_vllm_compile_cache

__all__ = [
    "CacheError",
    "CacheOperationInterrupted",
    "CacheValidationError",
    "OperationStatus",
    "clear_local_cache",
    "get_b10_logger",
    "get_cache_info",
    "list_available_caches",
    "load_compile_cache",
    "save_compile_cache",
    "save_vllm_compile_cache",
    "transfer",
]

logger = logging.getLogger(__name__)

ENGINE = "torch"
_SCOPE = "all"
_MB = 1 << 20
_COPY_BYTES = 16 << 20
_ENVIRONMENT_CHARS = 16


class OperationStatus(enum.Enum):
    """How an operation ended. True when a cache is in place: ``if not load_compile_cache(): …``."""

    SUCCESS = 1
    ERROR = 2
    DOES_NOT_EXIST = 3
    SKIPPED = 4

    def __bool__(self) -> bool:
        return self in (OperationStatus.SUCCESS, OperationStatus.SKIPPED)


_LOADED = {
    "restored": OperationStatus.SUCCESS,
    "complete": OperationStatus.SKIPPED,
    "nothing": OperationStatus.DOES_NOT_EXIST,
}
_SAVED = {
    "saved": OperationStatus.SUCCESS,
    "complete": OperationStatus.SKIPPED,
    "nothing": OperationStatus.SKIPPED,
}


def load_compile_cache() -> OperationStatus:
    """Bring what the store has for this environment into the local caches; call it before the first torch.compile.

    Returns:
        SUCCESS: something was restored. SKIPPED: everything was in place. DOES_NOT_EXIST: the store has nothing for
            this environment.
        ERROR: the store cannot be used or is not to be trusted, or caching is switched off; the log says why.
    """
    return _run("restore", _LOADED)


def save_compile_cache() -> OperationStatus:
    """Bring what the local caches have into the store; call it after warm-up.

    Returns:
        SUCCESS: a pack was saved. SKIPPED: the store has everything, or there is nothing to save.
        ERROR: there is no room, the store cannot be written, or caching is switched off; the log says why.
    """
    return _run("save", _SAVED)


def clear_local_cache() -> bool:
    """Delete inductor's local cache. False when something could not be deleted."""
    _name_inductor_directory()
    directory = INDUCTOR.directory()
    try:
        if directory.is_symlink():
            raise CacheValidationError(f"{directory} is a symbolic link; delete what it points to yourself")
        if directory.exists():
            shutil.rmtree(directory)
    except (OSError, CacheError) as error:
        logger.warning("compile cache: %s could not be cleared: %s", directory, error)
        return False
    return True


def get_cache_info() -> dict[str, Any]:
    """What the local caches and the store have for this environment; sizes in MB (2**20 bytes) where there is one.

    Keys: environment_key (16 hexadecimal digits), local_cache_exists, b10fs_enabled, b10fs_cache_exists,
    local_cache_size_mb, b10fs_cache_size_mb.
    """
    settings = _settings()
    key = _key(settings)
    local = sum(file.size for file in scan((INDUCTOR, TRITON), directories_of(ENGINE)))
    packs: list[int] = []
    if settings.enabled:
        with suppress(CacheError, OSError):
            packs = [stored.size for stored in _stored(settings) if stored.key_prefix == key.prefix]
    info: dict[str, Any] = {
        "environment_key": _short(key.prefix),
        "local_cache_exists": local > 0,
        "b10fs_enabled": settings.enabled,
        "b10fs_cache_exists": bool(packs),
    }
    if local:
        info["local_cache_size_mb"] = local / _MB
    if packs:
        info["b10fs_cache_size_mb"] = sum(packs) / _MB
    return info


def list_available_caches() -> dict[str, Any]:
    """All packs in the store, the newest first.

    Keys: caches (each with filename, environment_key, size_mb, is_current_environment, created_time),
    current_environment, total_caches, current_cache_exists, b10fs_enabled; error where the store cannot be read.
    """
    settings = _settings()
    key = _key(settings)
    result: dict[str, Any] = {
        "caches": [],
        "current_environment": _short(key.prefix),
        "b10fs_enabled": settings.enabled,
    }
    if not settings.enabled:
        off = "b10fs is not enabled (BASETEN_FS_ENABLED, compile_cache.enabled)"
        return result | {"total_caches": 0, "current_cache_exists": False, "error": off}
    try:
        for stored in sorted(_stored(settings), key=lambda item: item.modified, reverse=True):
            result["caches"].append(
                {
                    "filename": stored.name,
                    "environment_key": _short(stored.key_prefix),
                    "size_mb": stored.size / _MB,
                    "is_current_environment": stored.key_prefix == key.prefix,
                    "created_time": stored.modified,
                }
            )
    except (OSError, CacheError) as error:
        result["error"] = str(error)
    caches = result["caches"]
    return result | {
        "total_caches": len(caches),
        "current_cache_exists": any(cache["is_current_environment"] for cache in caches),
    }


def transfer(source: str | os.PathLike[str], dest: str | os.PathLike[str]) -> OperationStatus:
    """Copy a file, seen under ``dest`` only when it is complete; given up before a disk is full.

    Returns:
        SUCCESS, or ERROR: there is no such file, or it could not be copied; the log says why.
    """
    origin, target = Path(source), Path(dest)
    if target.is_dir():
        target = target / origin.name
    if not origin.is_file():
        logger.error("transfer: %s is not there, or is not a file", origin)
        return OperationStatus.ERROR
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        floor = _floor(target)
        floor.check(room_for(origin.stat().st_size))
        target.parent.mkdir(parents=True, exist_ok=True)
        with no_room_is_an_interruption(target.parent), origin.open("rb") as reader, unfinished.open("wb") as writer:
            while content := reader.read(_COPY_BYTES):
                floor.check(len(content))
                writer.write(content)
        shutil.copystat(origin, unfinished)
        unfinished.replace(target)
    except (OSError, CacheError, ValueError) as error:
        logger.error("transfer: %s -> %s: %s", origin, target, error)
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        return OperationStatus.ERROR
    return OperationStatus.SUCCESS


def _run(action: Literal["restore", "save"], statuses: dict[str, OperationStatus]) -> OperationStatus:
    _name_inductor_directory()
    outcome = run_drop_in(action, ENGINE, _key)
    return statuses.get(outcome.status, OperationStatus.ERROR)


def _name_inductor_directory() -> None:
    """Set the variables that inductor and Triton read: TORCH_CACHE_DIR is b10_transfer's name for inductor's directory,
    and Triton's default directory can change while a process runs.
    """
    directory = os.environ.get("TORCH_CACHE_DIR")
    # Parts of torch write the default into the variable when they are imported: that is not the user's choice.
    if directory and os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, "", default_inductor_directory()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
    os.environ.setdefault("TRITON_CACHE_DIR", str(TRITON.directory()))


def _settings() -> CompileCacheSettings:
    _name_inductor_directory()
    return drop_in_settings()


def _floor(target: Path) -> Floor:
    """What must stay free where ``target`` is: the store has a floor of its own."""
    settings = _settings()
    if target.absolute().is_relative_to(os.path.abspath(os.path.expanduser(settings.directory))):
        return Floor(target.parent, int(settings.min_store_free_bytes), "compile_cache.min_store_free_bytes")
    return Floor(target.parent, int(settings.min_local_free_bytes), "compile_cache.min_local_free_bytes")


def _short(key_prefix: str) -> str:
    """An environment in the form that b10_transfer's users know: 16 hexadecimal digits."""
    return hashlib.sha256(key_prefix.partition("/")[0].encode()).hexdigest()[:_ENVIRONMENT_CHARS]


def _key(settings: CompileCacheSettings) -> CacheKey:
    return environment_key({}, settings.scope or _SCOPE)


def _stored(settings: CompileCacheSettings) -> list[Any]:
    """The packs in the store.

    Raises:
        CacheError, OSError: it cannot be read.
    """
    return list(open_store(settings)[0].list())
