"""Triton's group files name the files of a kernel by absolute paths: they are rewritten where a cache moves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_GROUP_FILE = re.compile(r"(.*/)?__grp__[^/]*\.json")


def is_group_file(path: str) -> bool:
    """Whether the file holds absolute paths that must move with the cache."""
    return _GROUP_FILE.fullmatch(path) is not None


def relocated(content: bytes, old: Mapping[str, str], new: Mapping[str, Path]) -> bytes:
    """The content with every path below a cache's old root below its new one; unchanged where it is not JSON."""
    moves = [(path.rstrip("/"), str(new[name])) for name, path in old.items() if name in new and path]
    moves.sort(key=lambda move: len(move[0]), reverse=True)  # the deepest first: one cache may lie in another
    moves = [(source, target) for source, target in moves if source != target]
    if not moves:
        return content
    try:
        value = json.loads(content)
    except ValueError:
        return content
    return json.dumps(_moved(value, moves)).encode()


def _moved(value: Any, moves: list[tuple[str, str]]) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, moves) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, moves) for item in value]
    if isinstance(value, str):
        for source, target in moves:
            if value == source or value.startswith(f"{source}/"):
                return target + value[len(source) :]
    return value
