"""Names of a training's tensors -> names that an engine knows: the setting ``key_mapping``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from ...errors import CheckpointError, SettingsError
from .framework_layouts import is_layout, rename_llama

KeyMapping: TypeAlias = Mapping[str, str | None] | str | Callable[[str], str | None]
"""Regular expression -> replacement or None; or a function, its "module:function", or a layout's name (layouts.py)."""
Renamer: TypeAlias = Callable[[str], str | None]
"""The new name of a tensor; None: it is left out."""


def make_renamer(mapping: KeyMapping | None) -> Renamer:
    """The function that renames tensors.

    Args:
        mapping: regular expression -> replacement: as in transformers, the first one that is found in a name is
            applied to it, wherever it is; others keep their names. The replacement None leaves the tensor out. Or
            a function from the name to the new one, or None for a tensor that is to be left out; as "module:function"
            it is imported, so it is for an operator to set, never to be taken from a checkpoint. Of a layout
            (layouts.py), only the names are changed here.

    Raises:
        SettingsError: there is no such module or function.
        CheckpointError: an expression is none. The function that is returned raises it, too: for a replacement that is
            none, for an empty name, and where a function of one's own fails.
    """
    if not mapping:
        return lambda name: name
    if is_layout(mapping):
        return rename_llama
    if isinstance(mapping, Mapping):
        return _by_expressions(mapping)
    function = _imported(mapping) if isinstance(mapping, str) else mapping
    shown = mapping if isinstance(mapping, str) else getattr(mapping, "__qualname__", repr(mapping))

    def rename(name: str) -> str | None:
        try:
            renamed = function(name)
        except Exception as error:  # a function of one's own raises what it likes
            raise CheckpointError(f"key_mapping: {shown} failed for {name!r}: {_described(error)}") from error
        if renamed is not None and not isinstance(renamed, str):
            raise CheckpointError(f"key_mapping: {shown} made {renamed!r} of {name!r}, which is no name")
        return renamed if renamed is None else _checked(renamed, name)

    return rename


def _checked(renamed: str, name: str) -> str:
    if not renamed:
        raise CheckpointError(
            f"key_mapping makes an empty name of {name!r}",
            hint="null in place of the replacement (a function: None) leaves a tensor out",
        )
    return renamed


def _by_expressions(mapping: Mapping[str, str | None]) -> Renamer:
    try:
        patterns = [(re.compile(pattern), replacement) for pattern, replacement in mapping.items()]
    except re.error as error:
        raise CheckpointError(f"{error.pattern!r} in key_mapping is no regular expression: {error.msg}") from None

    def rename(name: str) -> str | None:
        for pattern, replacement in patterns:
            if replacement is None:
                if pattern.search(name):
                    return None
                continue
            try:
                renamed, count = pattern.subn(replacement, name)
            except (re.error, IndexError) as error:
                raise CheckpointError(f"{replacement!r} in key_mapping is no replacement: {error}") from None
            if count:
                return _checked(renamed, name)
        return name

    return rename


def _imported(location: str) -> Callable[[str], Any]:
    module_name, _, path = location.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        raise SettingsError(
            f"key_mapping: the module {module_name!r} of {location!r} cannot be imported: {_described(error)}; "
            "it must be on PYTHONPATH of every process of the engine"
        ) from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        what = "has no" if found is None else f"holds {found!r} and no"
        raise SettingsError(f"key_mapping: the module {module_name!r} {what} function {path!r}")
    return found  # type: ignore[no-any-return]


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
