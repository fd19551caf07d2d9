"""How adapters put their own code around an engine's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_engine_loader_wrapper"


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(original, …)`` in the place of a function of a module, or of a method of a class; once.

    The ``around`` of a class method gets the class behind the original.

    Raises:
        AttributeError: ``owner`` has no such function.
    """
    found = vars(owner).get(name)
    original = found.__func__ if isinstance(found, classmethod) else getattr(owner, name)
    if is_wrapped(owner, name):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **options: Any) -> Any:
        return around(original, *args, **options)

    setattr(wrapper, _MARK, True)
    setattr(owner, name, classmethod(wrapper) if isinstance(found, classmethod) else wrapper)


def is_wrapped(owner: Any, name: str) -> bool:
    """Whether ``wrap`` was here. (Who wrapped it since, as one should, left the mark on.)"""
    return hasattr(getattr(owner, name, None), _MARK)
