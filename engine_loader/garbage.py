"""Switches Python's garbage collection off while very many objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch garbage collection off while the block runs.

    Reading headers and metadata makes very many objects, and none of them is garbage. In a process with as many objects
    as an engine's, the collections would take several times as long as the reading.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
