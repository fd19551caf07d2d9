"""The settings of the compile cache as b10_transfer's users know their defaults.

The drop-in functions keep b10_transfer's defaults where nobody has set anything of this package: its store, and off
without BASETEN_FS_ENABLED. The plugin in vLLM and SGLang keeps this package's.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

from ..compile_cache.stores.object_names import MARKER
from ..settings import CompileCacheSettings, load_settings

logger = logging.getLogger(__name__)

PUBLISHED_STORE = Path("/cache/model/compile_cache")
"""b10_transfer's default of B10FS_CACHE_DIR."""
_BESIDE_ARCHIVES = "engine_loader"
_DIRECTORY, _ENABLED = "compile_cache.directory", "compile_cache.enabled"
_THEIR_DIRECTORY = "B10FS_CACHE_DIR"
_CAP = "MAX_CACHE_SIZE_CAP_MB"
_MULTIPLIER = "LOCAL_SPACE_ARCHIVE_MULTIPLIER"
_MB = 1 << 20


def drop_in_settings() -> CompileCacheSettings:
    """The settings that the functions of b10_transfer go by. What differs from the plugin's is warned of once.

    Raises:
        SettingsError: a setting is unknown or has a bad value.
        ValueError: MAX_CACHE_SIZE_CAP_MB is no number.
    """
    resolved = load_settings()
    settings, origins = resolved.settings.compile_cache, resolved.origins
    changed: dict[str, object] = {}
    if _ENABLED not in origins and origins.get(_DIRECTORY, _THEIR_DIRECTORY) == _THEIR_DIRECTORY:
        changed["enabled"] = False
        _tell_once(
            "off, as in b10_transfer, because BASETEN_FS_ENABLED is not set: set it to 1, or name a store by "
            "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY (vLLM and SGLang restore and save without either)"
        )
    elif _DIRECTORY not in origins and _can_be_written(PUBLISHED_STORE):
        changed["directory"] = str(_place_in(PUBLISHED_STORE))
        _tell_once(
            f"the store is {changed['directory']}, b10_transfer's default; the plugin in vLLM and SGLang uses "
            f"{settings.directory}, unless B10FS_CACHE_DIR names one for both"
        )
    cap = os.environ.get(_CAP, "").strip()
    if cap:
        changed["max_pack_bytes"] = min(int(settings.max_pack_bytes), int(cap) * _MB)
    return settings.model_copy(update=changed)


def room_for(nbytes: int) -> int:
    """The bytes that b10_transfer wants to be free for a file of ``nbytes``, where it was told how many.

    Raises:
        ValueError: LOCAL_SPACE_ARCHIVE_MULTIPLIER is no number.
    """
    multiplier = os.environ.get(_MULTIPLIER, "").strip()
    return max(nbytes, int(nbytes * float(multiplier))) if multiplier else nbytes


def _can_be_written(directory: Path) -> bool:
    place = directory if directory.exists() else directory.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _place_in(directory: Path) -> Path:
    """The directory itself, or one in it where it holds archives of b10_transfer: a store is not put among files of
    others."""
    ours = (directory / MARKER).exists() or not directory.is_dir() or not any(directory.iterdir())
    return directory if ours else directory / _BESIDE_ARCHIVES


@cache
def _tell_once(message: str) -> None:
    logger.warning("compile cache: %s", message)
