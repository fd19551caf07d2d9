"""Which store the settings name. A new kind of store is chosen here; ``interface`` says what it must do."""

from __future__ import annotations

from ...settings import CompileCacheSettings
from ...sources.registry import is_remote
from ..trust import Trust, load_trust
from .filesystem import FilesystemStore
from .interface import Store


def open_store(settings: CompileCacheSettings) -> tuple[Store, Trust]:
    """The store of the settings.

    Raises:
        CacheValidationError: the key file is refused, or an object store is not available or not trusted.
    """
    trust = load_trust(settings.key_file, anyone=settings.trust == "anyone")
    if is_remote(settings.directory):
        from .objects import ObjectCacheStore

        return ObjectCacheStore(settings.directory, trust, settings.work_directory, settings.store_name), trust
    floor = int(settings.min_store_free_bytes)
    return FilesystemStore(settings.directory, trust, floor, settings.store_name), trust
