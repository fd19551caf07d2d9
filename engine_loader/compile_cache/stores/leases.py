"""Leases: short-lived objects by which the pods of a fleet agree who does a piece of work.

A lease saves work. Nothing is wrong when two processes hold the same one, or when a store has none.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ..cache_errors import CacheError
from .interface import Store
from .object_names import LEASE, SAVING

LONGEST_S = 3600.0
_MOST_BYTES = 4096


@dataclass(frozen=True)
class Lease:
    """A lease that this process holds."""

    store: Store
    name: str
    owner: str

    def release(self) -> None:
        """Give it back, if it is still this process's. Raises nothing that a store may raise."""
        with suppress(OSError, CacheError):
            if _owner(self.store.read(self.name, _MOST_BYTES).content) == self.owner:
                self.store.delete(self.name)


def acquire(store: Store, prefix: str, what: str, seconds: float) -> Lease | None:
    """Take the lease ``what`` ("save", "compact"; without a prefix "prune") of a key, if nobody has it.

    Args:
        seconds: after which others may take it over; at most ``LONGEST_S``.

    Raises:
        OSError: the store fails.
    """
    name = f"{prefix}/{LEASE}{what}".lstrip("/")
    owner = uuid.uuid4().hex
    content = json.dumps(
        {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "seconds": min(seconds, LONGEST_S)}
    ).encode()
    if not store.create(name, content) and not _take_over(store, name, content):
        return None
    # A store that knows no conditions has taken several: the last counts.
    return Lease(store, name, owner) if _holds(store, name, owner) else None


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


def _take_over(store: Store, name: str, content: bytes) -> bool:
    try:
        held = store.read(name, _MOST_BYTES)
    except FileNotFoundError:
        return store.create(name, content)
    except CacheError:
        return False
    if store.now() - held.stored.modified <= _seconds(held.content):
        return False
    return store.replace(name, content, held.stored.version)


def _holds(store: Store, name: str, owner: str) -> bool:
    try:
        return _owner(store.read(name, _MOST_BYTES).content) == owner
    except (FileNotFoundError, CacheError):
        return False


def _owner(content: bytes) -> str:
    return str(_value(content).get("owner", ""))


def _seconds(content: bytes) -> float:
    seconds = _value(content).get("seconds")
    known = isinstance(seconds, (int, float)) and 0 <= seconds <= LONGEST_S
    return float(seconds) if known and seconds is not None else LONGEST_S


def _value(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        value = json.loads(content)
        if isinstance(value, dict):
            return value
    return {}
