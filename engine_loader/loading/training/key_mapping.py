"""Names of a training's tensors -> names that an engine knows: the setting ``key_mapping``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ...errors import CheckpointError, SettingsError
from ..mapping.named_layouts import rules_of, unwrapped
from ..mapping.rules import Rule, formatted

KeyMapping: TypeAlias = Mapping[str, str | None] | str | Callable[[str], str | None] | Sequence[Mapping[str, Any]]
"""Regular expression -> replacement or None; or a function, its "module:function", the name of a layout
(mapping/named_layouts.py), or rules (mapping/rules.py)."""
Renamer: TypeAlias = Callable[[str], str | None]
"""The new name of a tensor; None: it is left out."""


def make_renamer(mapping: KeyMapping | None) -> Renamer:
    """The function that renames tensors.

    Args:
        mapping: regular expression -> replacement: as in transformers, the first one that is found in a name is
            applied to it, wherever it is; others keep their names. The replacement None leaves the tensor out. Or
            a function from the name to the new one, or None for a tensor that is to be left out; as "module:function"
            it is imported, so it is for an operator to set, never to be taken from a checkpoint. Of a layout and of
            rules, only the names are changed here: of several that a tensor is cut into, the first.

    Raises:
        SettingsError: there is no such module or function.
        CheckpointError: an expression is none. The function that is returned raises it, too: for a replacement that is
            none, for an empty name, and where a function of one's own fails.
    """
    if not mapping:
        return lambda name: name
    rules = rules_of(mapping)
    if rules is not None:
        return lambda name: _by_rules(rules, unwrapped(name, mapping))
    if isinstance(mapping, Mapping):
        return _by_expressions(mapping)
    assert not isinstance(mapping, Sequence) or isinstance(mapping, str)
    function = _imported(mapping) if isinstance(mapping, str) else mapping
    shown = mapping if isinstance(mapping, str) else getattr(mapping, "__qualname__", repr(mapping))

    def rename(name: str) -> str | None:
        try:
            renamed = function(name)
        except Exception as error:  # a function of one's own raises what it likes
            raise CheckpointError(f"key_mapping: {shown} failed for {name!r}: {_described(error)}") from error
        if renamed is not None and not isinstance(renamed, str):
            raise CheckpointError(f"key_mapping: {shown} made {renamed!r} of {name!r}, which is not a name")
        return renamed if renamed is None else _checked(renamed, name)

    return rename


def _checked(renamed: str, name: str) -> str:
    if not renamed:
        raise CheckpointError(
            f"key_mapping makes an empty name of {name!r}",
            hint="null in place of the replacement (a function: None) leaves a tensor out",
        )
    return renamed


def _by_rules(rules: Sequence[Rule], name: str) -> str | None:
    for rule in rules:
        found = rule.match(name)
        if found is not None:
            places = {rule.number_place or "": "0", **found[1]}
            return formatted(rule.target[0], places) if rule.target else None
    return name


def _by_expressions(mapping: Mapping[str, str | None]) -> Renamer:
    try:
        patterns = [(re.compile(pattern), replacement) for pattern, replacement in mapping.items()]
    except re.error as error:
        raise CheckpointError(f"{error.pattern!r} in key_mapping is not a regular expression: {error.msg}") from None

    def rename(name: str) -> str | None:
        for pattern, replacement in patterns:
            if replacement is None:
                if pattern.search(name):
                    return None
                continue
            try:
                renamed, count = pattern.subn(replacement, name)
            except (re.error, IndexError) as error:
                raise CheckpointError(f"{replacement!r} in key_mapping is not a replacement: {error}") from None
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
