"""engine_loader: weights and compile caches for LLM inference engines, at the speed of the storage.

Importing this package costs milliseconds: torch is imported by what is used of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compat.callable_package import make_callable
from .errors import CheckpointError, EngineLoaderError, SettingsError, TensorNotFoundError, TransferError

if TYPE_CHECKING:
    from .compat.b10_transfer import (
        CacheError,
        CacheOperationInterrupted,
        CacheValidationError,
        OperationStatus,
        clear_local_cache,
        get_b10_logger,
        get_cache_info,
        list_available_caches,
        load_compile_cache,
        save_compile_cache,
        save_vllm_compile_cache,
        transfer,
    )
    from .compat.safetensors_files import replacing_safetensors, safe_open
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
    "get_b10_logger",
    "get_cache_info",
    "list_available_caches",
    "load_compile_cache",
    "open_checkpoint",
    "replacing_safetensors",
    "safe_open",
    "save_compile_cache",
    "save_vllm_compile_cache",
    "transfer",
]

_LAZY = {
    "Checkpoint": ".loading.checkpoint",
    "open_checkpoint": ".loading.checkpoint",
    "replacing_safetensors": ".compat.safetensors_files",
    "safe_open": ".compat.safetensors_files",
    "ask_for_huge_pages": ".transfer.memory.huge_pages",
    # `import engine_loader as b10_transfer` serves programs that were written for b10_transfer.
    **dict.fromkeys(
        (
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
        ),
        ".compat.b10_transfer",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


# b10_transfer's function of this name; the package holds nothing but its docstring, so importing it costs nothing.
make_callable(import_module(".transfer", __name__))
