"""engine_loader: weights and compile caches for LLM inference engines, at the speed of the storage.

Importing this package costs milliseconds: torch is imported by what is used of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, EngineLoaderError, SettingsError, TensorNotFoundError, TransferError

if TYPE_CHECKING:
    from .compile_cache.api import (
        CacheError,
        CacheOperationInterrupted,
        CacheValidationError,
        OperationStatus,
        clear_local_cache,
        get_cache_info,
        list_available_caches,
        load_compile_cache,
        save_compile_cache,
        transfer,
    )
    from .loading.checkpoint import Checkpoint, open_checkpoint
    from .transfer.memory.huge_pages import ask_for_huge_pages

__version__ = "0.1.0"
__all__ = [
    "CacheError",
    "CacheOperationInterrupted",
    "CacheValidationError",
    "Checkpoint",
    "CheckpointError",
    "EngineLoaderError",
    "OperationStatus",
    "SettingsError",
    "TensorNotFoundError",
    "TransferError",
    "ask_for_huge_pages",
    "clear_local_cache",
    "get_cache_info",
    "list_available_caches",
    "load_compile_cache",
    "open_checkpoint",
    "save_compile_cache",
    "transfer",
]

_LAZY = {"Checkpoint": ".loading.checkpoint", "open_checkpoint": ".loading.checkpoint"}
_LAZY["ask_for_huge_pages"] = ".transfer.memory.huge_pages"
_LAZY |= dict.fromkeys(
    (
        "CacheError",
        "CacheOperationInterrupted",
        "CacheValidationError",
        "OperationStatus",
        "clear_local_cache",
        "get_cache_info",
        "list_available_caches",
        "load_compile_cache",
        "save_compile_cache",
    ),
    ".compile_cache.api",
)  # `import engine_loader as b10_transfer` serves programs that were written for it


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "transfer":  # the package, which can also be called: see there
        return import_module(".transfer", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
