"""Functions of other packages, replaced where these offer no hook: for good, or while a block runs.

``wrap`` is for good. ``replaced`` holds while a block runs, for all threads; ``wrapped_in_thread`` holds while a block
runs, for one thread. Nothing here waits: several replacements of one attribute may be in force at a time and end in any
order, and what other code has put over one of them stays in force.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_MARK = "_engine_loader_wrapper"
_ABSENT = object()
# Reentrant: the garbage collector may end an abandoned block while this thread begins another.
_lock = threading.RLock()
_in_force: list[_Replacement] = []


def wrap(owner: Any, name: str, around: Callable[..., Any], *, purpose: str = "") -> None:
    """Have calls of a function reach ``around(original, *args, **options)``, for good.

    A second call for the same function and purpose does nothing. The ``around`` of a classmethod gets the class behind
    the original.

    Args:
        owner: the module, class or instance that has the function.
        name: of the function.
        around: returns what the caller gets.
        purpose: of several wrappers of one function, each has its own.

    Raises:
        AttributeError: ``owner`` has no such function.
    """
    original = _function(owner, name)
    if is_wrapped(owner, name, purpose):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **options: Any) -> Any:
        return around(original, *args, **options)

    setattr(wrapper, _MARK + purpose, True)
    setattr(owner, name, _of_same_kind(owner, name, wrapper))


def is_wrapped(owner: Any, name: str, purpose: str = "") -> bool:
    """True if this function carries the mark of ``wrap``; functools.wraps copies the mark to later wrappers."""
    return hasattr(getattr(owner, name, None), _MARK + purpose)


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute to ``value`` while the block runs, for all threads.

    When the block ends, the attribute is what it was before; one that ``owner`` inherits is deleted from ``owner``
    again. If other code has set it since the block began, that stays: it may belong to a plugin, for good.

    Raises:
        AttributeError: ``owner`` has no such attribute.
    """
    getattr(owner, name)
    with _lock:
        own = _put(owner, name, value)
    try:
        yield
    finally:
        _take_back(own)


@contextmanager
def wrapped_in_thread(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Have this thread's calls of a function reach ``around(original, *args, **options)`` while the block runs.

    Calls from other threads reach the original, and so do calls after the block, by whatever code kept the function.

    Raises:
        AttributeError: ``owner`` has no such function.
    """
    thread = threading.get_ident()
    running = True
    with _lock:  # the original is read, and the attribute set, with nothing between
        original = _function(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **options: Any) -> Any:
            if running and threading.get_ident() == thread:
                return around(original, *args, **options)
            return original(*args, **options)

        own = _put(owner, name, _of_same_kind(owner, name, wrapper))
    try:
        yield
    finally:
        running = False
        _take_back(own)


@dataclass(eq=False)
class _Replacement:
    """An attribute that is set for a while.

    Attributes:
        owner, name: whose, and which.
        value: what it is set to.
        before: what ``owner`` itself had under the name; ``_ABSENT`` where it had nothing, or inherits it.
    """

    owner: Any
    name: str
    value: object
    before: object


def _put(owner: Any, name: str, value: object) -> _Replacement:
    own = _Replacement(owner, name, value, vars(owner).get(name, _ABSENT))
    setattr(owner, name, value)
    _in_force.append(own)
    return own


def _take_back(own: _Replacement) -> None:
    with _lock:
        _in_force.remove(own)
        for later in _in_force:
            if later.owner is own.owner and later.name == own.name and later.before is own.value:
                later.before = own.before
                return
        if vars(own.owner).get(own.name, _ABSENT) is not own.value:
            return
        if own.before is _ABSENT:
            delattr(own.owner, own.name)
        else:
            setattr(own.owner, own.name, own.before)


def _function(owner: Any, name: str) -> Callable[..., Any]:
    """The function itself where ``owner`` has a classmethod or staticmethod; else what the attribute gives."""
    found = vars(owner).get(name)
    function: Callable[..., Any] = (
        found.__func__ if isinstance(found, classmethod | staticmethod) else getattr(owner, name)
    )
    return function


def _of_same_kind(owner: Any, name: str, wrapper: Callable[..., Any]) -> Any:
    """``wrapper`` as a classmethod or staticmethod where ``owner`` has one under the name."""
    found = vars(owner).get(name)
    return type(found)(wrapper) if isinstance(found, classmethod | staticmethod) else wrapper
