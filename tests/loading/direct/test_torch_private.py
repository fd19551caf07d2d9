"""Direct mode uses private names of torch in one file only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import torch

import engine_loader.loading.direct
from engine_loader.loading.direct import torch_private

ROOM = Path(engine_loader.loading.direct.__file__).parent


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of the private attributes of other objects, and of the imports of torch's private names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Import):
            names = [name for alias in node.names for name in alias.name.split(".")]
            yield from ((node.lineno, name) for name in names if is_private(name))


def test_private_names_of_torch_stand_in_one_file() -> None:
    found = {path.name: list(private_names(ast.parse(path.read_text()))) for path in sorted(ROOM.glob("*.py"))}
    assert found.pop("torch_private.py")
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_this_version_of_torch_has_the_private_names_that_are_listed_as_texts() -> None:
    for name in torch_private.PRIVATE_VIEWS:
        assert hasattr(torch.ops.aten, name), name
    for name in torch_private.PRIVATE_EXPOSING_METHODS:
        assert hasattr(torch.Tensor, name), name

    class Subclass(torch.Tensor):
        pass

    assert getattr(torch.nn.Parameter(torch.zeros(1).as_subclass(Subclass)), torch_private.PARAMETER_MARK)
