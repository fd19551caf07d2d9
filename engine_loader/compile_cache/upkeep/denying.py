"""By which names a pack is denied: its own, and that of its content, so that equal content is not saved again."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from ..cache_errors import CacheError
from ..packs.pack import read_manifest
from ..stores.interface import Store
from ..trust import Trust


def names_of(store: Store, trust: Trust, digests: Collection[str]) -> set[str]:
    """``digests``, and those of the first generations of the same content, where the store has packs of these names.

    A pack that was signed again, or saved anew beside a damaged one, has another name than the first of its content.

    Raises:
        OSError: the store cannot be listed.
    """
    found = set(digests)
    for stored in store.list() if store.name else ():
        if stored.digest in digests:
            with suppress(OSError, CacheError):  # it cannot be read: its own name is what is known
                found.update(read_manifest(store, stored, stored.key_prefix, trust.without_denied()).manifest.names)
    return found
