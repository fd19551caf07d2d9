"""Notes of use: a tiny object a key and day, from which retention counts, whoever wrote the packs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

from ..cache_errors import CacheError
from .interface import Store, Stored
from .object_names import USED


def note_used(store: Store, prefix: str) -> None:
    """Note that a key was restored today, where the last listing of the key shows no such note. Where the store cannot
    be written, nothing happens.
    """
    # The day in the name is this machine's: it only keeps the notes few. The age is that of the object.
    name = f"{prefix}/{USED}{day(time.time())}"
    if not store.was_listed(name):
        with suppress(OSError, CacheError):
            store.replace(name, b"")


def last_used(entries: Iterable[Stored]) -> float:
    """When a key was last restored, in the store's time; 0 for never."""
    return max((entry.modified for entry in entries if entry.kind == "used"), default=0.0)


def day(when: float) -> str:
    """A day as YYYY-MM-DD, in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(when))
