"""engine_loader: weights and compile caches for LLM inference engines, at the speed of the storage.

Importing this package costs milliseconds: torch is imported by what is used of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, EngineLoaderError, SettingsError, TensorNotFoundError, TransferError

if TYPE_CHECKING:
    from .loading.checkpoint import Checkpoint, open_checkpoint

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "CheckpointError",
    "EngineLoaderError",
    "SettingsError",
    "TensorNotFoundError",
    "TransferError",
    "open_checkpoint",
]

_LAZY = {"Checkpoint": ".loading.checkpoint", "open_checkpoint": ".loading.checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)
