"""The texts of the package, in which a document's quoted messages must be found."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "engine_loader"


@cache
def texts_of_the_package() -> str:
    """All its texts, those of one expression as one, with \\0 between."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\0".join(found)
