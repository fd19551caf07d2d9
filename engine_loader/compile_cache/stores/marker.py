"""The marker in a store's root: it says that the store is ours, and the store's name, which signatures cover."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING

from ..cache_errors import CacheValidationError
from .names import MARKER

if TYPE_CHECKING:
    from .interface import Store

FORMAT = 2
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_BYTES = 4096


def read_marker(store: Store, expected: str | None) -> str | None:
    """The store's name; None without a marker.

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
        form, name = value["format"], value["store"]
    except (ValueError, KeyError, TypeError) as error:
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
    return name


def name_of(store: Store, expected: str | None) -> str | None:
    """The store's name; None for an empty store.

    Raises:
        CacheValidationError: as ``read_marker``; or there is something, and no marker.
        OSError: the store fails.
    """
    name = read_marker(store, expected)
    if name is None and not store.is_empty():
        name = read_marker(store, expected)  # another process may have written it, and more, meanwhile
        if name is None:
            raise CacheValidationError(
                f"{store.description}: refused: it is not empty, and has no marker ({MARKER}) of a store of compile "
                "caches; name another directory, or make this one a store by `engine-loader compile-cache adopt` "
                "(what else lies there stays untouched)"
            )
    return name


def found(store: Store, expected: str | None) -> str:
    """The store's name; an empty store gets a marker first. Raises as ``name_of``."""
    return name_of(store, expected) or adopt(store, expected)


def adopt(store: Store, name: str | None = None) -> str:
    """Write the marker, whatever else lies in the store; the store's name.

    Args:
        name: None: a new one.

    Raises:
        CacheValidationError: the name has other characters than letters, digits, ".", "_" and "-"; or the store has
            another name already.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise CacheValidationError(
            f"a store's name has 1 to 64 letters, digits, dots, underscores and hyphens: {name!r} does not"
        )
    value = {"format": FORMAT, "store": name or uuid.uuid4().hex, "created": round(store.now())}
    store.create(MARKER, json.dumps(value).encode())
    # Another process may have been first: its marker counts.
    there = read_marker(store, None)
    if name is not None and there is not None and there != name:
        raise CacheValidationError(f"{store.description}: is the store {there!r} already: it cannot become {name!r}")
    if there is None:
        raise CacheValidationError(f"{store.description}/{MARKER}: refused: it was deleted as soon as it was written")
    return there
