"""Python's garbage collection, kept away while very many objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Headers and metadata become very many objects, and none of them garbage: in a process as large as an engine's,
    looking for some time and again takes several times as long as reading them."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
