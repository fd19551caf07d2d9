"""Which store the settings name. A new kind of store is chosen here; ``interface`` says what it must do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import SettingsError
from ...escaping import printable
from ...home import home_expanded, why_no_directory
from ...settings import CompileCacheSettings, load_settings
from ...sources.registry import is_remote
from ..cache_errors import CacheError
from ..trust import Trust, load_trust
from .filesystem import FilesystemStore
from .interface import Store

if TYPE_CHECKING:
    from ...sources.object_store.client import ObjectStoreOptions

_SETTING = "compile_cache.directory"


def open_store(
    settings: CompileCacheSettings, state: Path | None = None, *, options: ObjectStoreOptions | None = None
) -> tuple[Store, Trust]:
    """The store of the settings, and which of its packs are taken.

    Args:
        state: a directory of this node, where the newest deny-list of the store is noted; None: nothing is noted.
        options: how patiently an object store is asked; None: as for weights by default.

    Raises:
        CacheValidationError: the key file is refused, or an object store is not available or not trusted.
        CacheError: a file stands where the directory of the store, or one above it, would be.
        OSError: the directory begins with ``~``, and there is no home.
    """
    trust = load_trust(
        settings.key_file,
        settings.public_keys,
        anyone=settings.trust == "anyone",
        most_age_days=settings.max_pack_age_days,
    )
    store = _store(settings, trust, options)
    return store, trust.with_denied(store, state)


def check_settings(settings: CompileCacheSettings) -> None:
    """Refuse settings with which the cache can never work: a key file that is missing or wrong, a store whose path
    leads through a file, or whose packs would not be taken. Nothing is asked of the store: what may pass is no mistake.

    Raises:
        SettingsError: it names the setting, and how the cache is switched off.
    """
    if not settings.enabled:
        return
    try:
        trust = load_trust(settings.key_file, settings.public_keys, anyone=settings.trust == "anyone")
        if settings.directory == type(settings).model_fields["directory"].default:
            return  # nobody chose it: without a home, engines start without a cache
        _store(settings, trust)
    except (CacheError, OSError) as error:
        raise SettingsError(
            f"the compile cache cannot work: {error}; repair that, or start without it: "
            "ENGINE_LOADER_COMPILE_CACHE__ENABLED=false"
        ) from error


def _check_place(directory: str) -> None:
    """Refuse the directory of a store where a file stands in its place, or above it.

    Raises:
        CacheError: it names the setting, where that was set, the directory, and what is there.
        OSError: the directory begins with ``~``, and there is no home.
    """
    path = home_expanded(directory).absolute()
    if reason := why_no_directory(path):
        resolved = load_settings()
        origin = resolved.origins.get(_SETTING) if resolved.settings.compile_cache.directory == directory else None
        where = f"{_SETTING} (set by {origin})" if origin else _SETTING
        raise CacheError(f"{where} is {printable(str(path))}, and {reason}: name another directory there")


def _store(settings: CompileCacheSettings, trust: Trust, options: ObjectStoreOptions | None = None) -> Store:
    if is_remote(settings.directory):
        from .objects import ObjectCacheStore

        return ObjectCacheStore(settings.directory, trust, settings.work_directory, settings.store_name, options)
    _check_place(settings.directory)
    floor = int(settings.min_store_free_bytes)
    return FilesystemStore(settings.directory, trust, floor, settings.store_name)
