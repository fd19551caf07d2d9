"""Names of the engines that the adapters import, read from the adapters' own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import engine_loader

from .expectations import Expected

_ENGINES = Path(engine_loader.__file__).parent / "engines"


def imported_by_adapter(engine: str) -> list[Expected]:
    """One expectation for each name of ``engine`` (vllm, sglang) that an adapter imports.

    Of an import within ``try``, and that of its handler, one is enough; after a test with ``hasattr`` it may be absent
    in the list of the engine (``vllm.py``, ``sglang.py``), which counts instead.
    """
    found: dict[str, Expected] = {}
    for path in sorted(_ENGINES.joinpath(engine).glob("*.py")):
        tree = ast.parse(path.read_text())
        alternatives = {
            id(node): [_paths(handler.body, engine) for handler in attempt.handlers]
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try)
            for node in attempt.body
        }
        in_handlers = {
            id(node)
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try)
            for handler in attempt.handlers
            for node in ast.walk(handler)
        }
        for node in ast.walk(tree):
            if id(node) in in_handlers or not isinstance(node, ast.ImportFrom):
                continue
            others = [name for names in alternatives.get(id(node), ()) for name in names]
            for name in _paths([node], engine):
                found.setdefault(name, Expected(" or ".join([name, *others]), f"{path.name} imports it"))
    return list(found.values())


def _paths(nodes: list[ast.stmt], engine: str) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == engine:
            for alias in node.names:
                yield f"{node.module}:{alias.name}"
