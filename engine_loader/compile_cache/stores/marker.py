"""The marker in a store's root: it says that the store is ours, and the store's name, which signatures cover."""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from ..cache_errors import CacheValidationError
from ..store_reads import Reads
from .clock import StoreClock
from .interface import Small, Stored
from .object_names import DENIED, MARKER

FORMAT = 2
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_BYTES = 256 << 10


@dataclass(frozen=True)
class Marker:
    """What a marker says.

    Attributes:
        store: the store's name.
        denies: whether the store has, or had, a deny-list: without one, a restore need not ask for it.
    """

    store: str
    denies: bool = False
    copy: Any = None
    """The deny-list as it stands in ``denied.json``, where it is short."""


class Marking(Protocol):
    """What a marker needs of a store."""

    description: str

    def is_empty(self) -> bool: ...

    def read(self, name: str, most_bytes: int) -> Small: ...

    def create(self, name: str, content: bytes) -> bool: ...

    def replace(self, name: str, content: bytes, version: str | None = None) -> bool: ...

    def now(self) -> float: ...


class MarkedStore(ABC):
    """What all stores have in common: the marker, and a clock.

    Args:
        expected: the name that the store must have; None: any.

    Attributes:
        reads: what was read, in pieces; of an object store nothing is noted.
    """

    description: str

    def __init__(self, expected: str | None) -> None:
        self.reads: Reads = {}
        self._expected = expected
        self._marker: Marker | None = None
        self._clock = StoreClock(self._measure)

    @property
    def name(self) -> str:
        if self._marker is None:
            self._marker = marker_of(self, self._expected)
        return self._marker.store if self._marker else ""

    @property
    def denies(self) -> bool:
        return bool(self.name) and self._marker is not None and self._marker.denies

    def found(self) -> None:
        if self._marker is None:
            self._marker = marker_of(self, self._expected) or _adopted(self, self._expected)

    @property
    def denied_copy(self) -> Any:
        return self._marker.copy if self.name and self._marker is not None else None

    def announce_denied(self, copy: Any = None) -> None:
        self.found()
        if not self.denies or self.denied_copy != copy:
            note_denied(self, copy)
            self._marker = Marker(self.name, denies=True, copy=copy)

    def now(self) -> float:
        return self._clock.now()

    def known_time(self) -> float:
        return self._clock.known()

    @abstractmethod
    def is_empty(self) -> bool: ...

    @abstractmethod
    def entries(self, prefix: str = "") -> list[Stored]: ...

    @abstractmethod
    def read(self, name: str, most_bytes: int) -> Small: ...

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool: ...

    @abstractmethod
    def replace(self, name: str, content: bytes, version: str | None = None) -> bool: ...

    @abstractmethod
    def _measure(self) -> float:
        """The time that the store gives to what is written now. Raises OSError where it cannot be written."""

    def list(self, prefix: str = "") -> list[Stored]:
        return [found for found in self.entries(prefix) if found.kind == "pack"]


def read_marker(store: Marking, expected: str | None) -> Marker | None:
    """The store's marker; None without one.

    Args:
        expected: the name that the store must have, where one is set.

    Raises:
        CacheValidationError: the marker cannot be read, or has another name.
        OSError: the store fails.
    """
    location = f"{store.description}/{MARKER}"
    try:
        content = store.read(MARKER, _MOST_BYTES).content
    except FileNotFoundError:
        return None
    try:
        value = json.loads(content)
        form, name, denies, copy = value["format"], value["store"], value.get("denies", False), value.get("denied")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheValidationError(
            f"{location}: refused: it cannot be read ({type(error).__name__}); delete it and run "
            "`engine-loader compile-cache adopt`"
        ) from None
    if form != FORMAT:
        raise CacheValidationError(f"{location}: refused: the store's format is {form!r}, this version reads {FORMAT}")
    if type(name) is not str or not _NAME.fullmatch(name):
        raise CacheValidationError(f"{location}: refused: the store's name in it is not one")
    if expected is not None and name != expected:
        raise CacheValidationError(
            f"{location}: refused: this is the store {name!r}, and compile_cache.store_name is {expected!r}"
        )
    return Marker(name, denies is True, copy)


def marker_of(store: Marking, expected: str | None) -> Marker | None:
    """The store's marker; None for an empty store.

    Raises:
        CacheValidationError: as ``read_marker``; or there is something, and no marker.
        OSError: the store fails.
    """
    there = read_marker(store, expected)
    if there is None and not store.is_empty():
        there = read_marker(store, expected)  # another process may have written it, and more, meanwhile
        if there is None:
            raise CacheValidationError(
                f"{store.description}: refused: it is not empty, and has no marker ({MARKER}) of a store of compile "
                "caches; name another directory, or make this one a store by `engine-loader compile-cache adopt` "
                "(what else lies there stays untouched)"
            )
    return there


def adopt(store: Marking, name: str | None = None) -> str:
    """Write the marker, whatever else lies in the store; the store's name.

    Args:
        name: None: a new one.

    Raises:
        CacheValidationError: the name has other characters than letters, digits, ".", "_" and "-"; or the store has
            another name already.
    """
    return _adopted(store, name).store


def _adopted(store: Marking, name: str | None) -> Marker:
    """The store's marker after ``adopt``."""
    if name is not None and not _NAME.fullmatch(name):
        raise CacheValidationError(
            f"a store's name has 1 to 64 letters, digits, dots, underscores and hyphens: {name!r} does not"
        )
    value = {"format": FORMAT, "store": name or uuid.uuid4().hex, "created": round(store.now())}
    if _has_denied(store):
        value["denies"] = True
    store.create(MARKER, json.dumps(value).encode())
    # Another process may have been first: its marker counts.
    there = read_marker(store, None)
    if name is not None and there is not None and there.store != name:
        raise CacheValidationError(
            f"{store.description}: is the store {there.store!r} already: it cannot become {name!r}"
        )
    if there is None:
        raise CacheValidationError(f"{store.description}/{MARKER}: refused: it was deleted as soon as it was written")
    return there


def note_denied(store: Marking, copy: Any = None) -> None:
    """Let the marker say that there is a deny-list, and hold a copy of it. Raises OSError when the store fails."""
    value: dict[str, Any] = json.loads(store.read(MARKER, _MOST_BYTES).content)
    store.replace(MARKER, json.dumps({**value, "denies": True, "denied": copy}).encode())


def _has_denied(store: Marking) -> bool:
    try:
        store.read(DENIED, 0)
    except FileNotFoundError:
        return False
    except CacheValidationError:  # it has more than 0 bytes
        return True
    return True
