"""Key files: a key a line, of which the first that can sign signs, and all verify."""

from __future__ import annotations

import os
from pathlib import Path

from ..cache_errors import CacheValidationError
from .places import open_to_others
from .signatures import HmacKey, Key

_LEAST_KEY_BYTES = 16
_MOST_FILE_BYTES = 1 << 16
_MAKE_ONE = "make one with `head -c 32 /dev/urandom | base64`"


def read_key_file(key_file: str) -> tuple[Key, ...]:
    """The keys of a file.

    Raises:
        CacheValidationError: it cannot be read, a key is too short, or others may write it.
    """
    path = Path(key_file).expanduser()
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise CacheValidationError(f"compile_cache.key_file: could not read {path}: {error.strerror}") from None
    if reason := open_to_others(facts):
        raise CacheValidationError(f"compile_cache.key_file: {path} is refused: {reason}; run `chmod 600 {path}`")
    if not content.strip():
        raise CacheValidationError(f"compile_cache.key_file: {path} is empty; {_MAKE_ONE}")
    lines = [line.strip() for line in content.splitlines()]
    return tuple(parse_key(line, f"compile_cache.key_file: {path}") for line in filter(None, lines))


def parse_key(line: bytes, where: str) -> Key:
    """The key that a line holds.

    Raises:
        CacheValidationError: it is too short; the message begins with ``where``.
    """
    if len(line) < _LEAST_KEY_BYTES:
        raise CacheValidationError(
            f"{where} holds a key of {len(line)} bytes, {_LEAST_KEY_BYTES} or more are needed; {_MAKE_ONE}"
        )
    return HmacKey(line)
