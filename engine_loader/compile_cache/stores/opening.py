"""Which store the settings name. A new kind of store is chosen here; ``interface`` says what it must do."""

from __future__ import annotations

from pathlib import Path

from ...settings import CompileCacheSettings
from ...sources.registry import is_remote
from ..trust import Trust, load_trust
from .filesystem import FilesystemStore
from .interface import Store


def open_store(settings: CompileCacheSettings, state: Path | None = None) -> tuple[Store, Trust]:
    """The store of the settings, and which of its packs are taken.

    Args:
        state: a directory of this node, where the newest deny-list of the store is noted; None: nothing is noted.

    Raises:
        CacheValidationError: the key file is refused, or an object store is not available or not trusted.
    """
    trust = load_trust(
        settings.key_file,
        settings.public_keys,
        anyone=settings.trust == "anyone",
        most_age_days=settings.max_pack_age_days,
    )
    store = _store(settings, trust)
    return store, trust.with_denied(store, state)


def _store(settings: CompileCacheSettings, trust: Trust) -> Store:
    if is_remote(settings.directory):
        from .objects import ObjectCacheStore

        return ObjectCacheStore(settings.directory, trust, settings.work_directory, settings.store_name)
    floor = int(settings.min_store_free_bytes)
    return FilesystemStore(settings.directory, trust, floor, settings.store_name)
