"""Whether the interpreter has to compile what it imports in every start, since it cannot keep the result."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys

OFFER = "set PYTHONPYCACHEPREFIX to a directory that can be written and outlives the start"
_HEADER = struct.Struct("<4sIII")


def why_not_kept(module: str) -> str | None:
    """The reason why a module's compiled code (.pyc) is neither there nor will be kept; None where it is or will be.

    Args:
        module: the name of a top-level module, which is not imported; None is returned where it is not installed.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.has_location or spec.cached is None:
        return None
    if _is_there(spec.cached, spec.origin):
        return None
    if sys.dont_write_bytecode:
        return "PYTHONDONTWRITEBYTECODE is set"
    place = os.path.dirname(spec.cached)
    while not os.path.lexists(place):  # Python makes what is missing
        place = os.path.dirname(place)
    return None if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written"


def _is_there(cached: str, source: str) -> bool:
    """Whether the compiled code is there, and of this source: images that are copied may have other times."""
    try:
        with open(cached, "rb") as file:
            magic, flags, mtime, size = _HEADER.unpack(file.read(_HEADER.size))
        status = os.stat(source)
    except (OSError, struct.error):
        return False
    if magic != importlib.util.MAGIC_NUMBER:
        return False
    return bool(flags) or (mtime, size) == (int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
