"""Processes that an engine starts and that load no plugins: they register by what they are given.

vLLM's weight cache daemon (``vllm preload``) and SGLang's encoder workers and expert backup are spawned with the
engine's configuration, and look for its load format without having loaded plugins. ``multiprocessing`` lets a class say
how its objects are handed to other processes (``ForkingPickler.register``): one that names this package's load format
registers this package in the process that receives it, before the engine's code runs there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from ...plugin import LOAD_FORMAT, register


def register_in_receivers(kind: type, load_format_of: Callable[[Any], Any]) -> None:
    """Have processes that are given an object of ``kind`` register this package; a second call does nothing.

    Args:
        kind: a class of the engine's; objects of classes that extend it are not meant.
        load_format_of: gives an object's load format. Objects with another one are handed over as before.
    """

    def reduce(value: Any) -> Any:
        reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if isinstance(reduced, str) or str(load_format_of(value)) != LOAD_FORMAT:
            return reduced
        make, arguments, *rest = reduced
        return (_registered, (make, arguments), *rest)

    ForkingPickler.register(kind, reduce)


def _registered(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    register()
    return make(*arguments)
