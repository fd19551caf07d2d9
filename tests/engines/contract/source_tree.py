"""Looks names up in the source of an installed or unpacked package, without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

Definition = ast.AST
"""A function, a class, an assignment, an import, or a module."""


class SourceTree:
    """The modules below a directory that holds packages (site-packages, or an unpacked wheel)."""

    def __init__(self, site: Path) -> None:
        self.site = site
        self._module = cache(self._parse)

    def text(self, module: str) -> str | None:
        """The source of a module; None where there is no such module."""
        path = self._path(module)
        return None if path is None else path.read_text()

    def find(self, path: str) -> Definition | None:
        """The definition of ``module:name.attribute``, or of ``module``; None where it is not there.

        Names that a module imports are followed to where they are defined, attributes to the base classes.
        """
        module, _, names = path.partition(":")
        found: Definition | None = self._module(module)
        where = module
        for name in filter(None, names.split(".")):
            if found is None:
                return None
            found, where = self._member(found, name, where)
        return found

    def _path(self, module: str) -> Path | None:
        base = self.site.joinpath(*module.split("."))
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)

    def _parse(self, module: str) -> ast.Module | None:
        text = self.text(module)
        if text is None:  # a directory of modules may do without an __init__.py
            text = "" if self.site.joinpath(*module.split(".")).is_dir() else None
        return None if text is None else _parsed(text)

    def _member(self, holder: Definition, name: str, module: str) -> tuple[Definition | None, str]:
        """The definition of ``name`` in a module or class, and the module that has it."""
        body = getattr(holder, "body", ())
        for node in _statements(body):
            if isinstance(node, ast.ImportFrom | ast.Import):
                imported = self._imported(node, name, module)
                if imported is not None and imported[0] is not None:
                    return imported
            elif name in _names_of(node):
                return node, module
        if isinstance(holder, ast.Module) and self._module(f"{module}.{name}") is not None:
            return self._module(f"{module}.{name}"), f"{module}.{name}"
        if isinstance(holder, ast.ClassDef):
            return self._attribute(holder, name, module)
        return None, module

    def _imported(
        self, node: ast.ImportFrom | ast.Import, name: str, module: str
    ) -> tuple[Definition | None, str] | None:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            origin = self._origin(node, module)
            everything = self._module(origin)
            return None if everything is None else self._member(everything, name, origin)
        alias = next((alias for alias in node.names if (alias.asname or alias.name) == name), None)
        if alias is None:
            return None
        if isinstance(node, ast.Import):
            return node, module
        origin = self._origin(node, module)
        found = self._module(origin)
        if found is None:
            return node, module  # of another package
        return self._member(found, alias.name, origin)

    def _origin(self, node: ast.ImportFrom, module: str) -> str:
        if not node.level:
            return node.module or ""
        path = self._path(module)
        parts = module.split(".")
        is_package = path is not None and path.name == "__init__.py"
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *filter(None, [node.module])])

    def _attribute(self, holder: ast.ClassDef, name: str, module: str) -> tuple[Definition | None, str]:
        for node in ast.walk(holder):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and node.attr == name
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                return node, module
        for base in holder.bases:
            if isinstance(base, ast.Subscript):  # Base[T]
                base = base.value
            if isinstance(base, ast.Name):
                known = self._module(module)
                parent, where = self._member(known, base.id, module) if known is not None else (None, module)
                if isinstance(parent, ast.ClassDef):
                    found, there = self._member(parent, name, where)
                    if found is not None:
                        return found, there
        return None, module


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[list[str], list[str], set[str], bool]:
    """The positional parameters of a function in their order, those that only go by keyword, those with a default, and
    whether it takes any keyword.
    """
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    keywords = [argument.arg for argument in arguments.kwonlyargs]
    with_default = set(positional[len(positional) - len(arguments.defaults) :])
    with_default |= {name for name, default in zip(keywords, arguments.kw_defaults, strict=True) if default is not None}
    return positional, keywords, with_default, arguments.kwarg is not None


def called_names(function: Definition) -> set[str]:
    """The last parts of the names that are called within: ``get`` for ``a.b.get()``."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                found.add(node.func.attr)
            elif isinstance(node.func, ast.Name):
                found.add(node.func.id)
    return found


def constants(node: Definition) -> set[object]:
    """The strings and numbers that stand in a definition."""
    return {child.value for child in ast.walk(node) if isinstance(child, ast.Constant)}


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those of its branches."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, ()))
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)}
