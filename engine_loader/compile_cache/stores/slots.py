"""How many saves write to a store at once: each has a note in the store, and one listing of the notes tells."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..cache_errors import CacheError
from .interface import Store
from .object_names import SAVING


@contextmanager
def save_slot(store: Store, most: int, timeout_s: float) -> Iterator[bool]:
    """Count as a save that is under way; the value is whether it is one of the first ``most``.

    Args:
        timeout_s: older notes are of processes that are gone.

    Raises:
        OSError: the store fails.
    """
    name = f"{SAVING}/{uuid.uuid4().hex}"
    store.replace(name, b"")
    try:
        notes = store.entries(SAVING)
        now = max([store.known_time(), *(note.modified for note in notes)])
        under_way = sorted((note.modified, note.name) for note in notes if now - note.modified <= timeout_s)
        yield name in {first for _, first in under_way[:most]}
    finally:
        with suppress(OSError, CacheError):
            store.delete(name)
