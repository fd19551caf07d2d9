"""What is said about a wrong setting: where it stands, what it is, and what is valid."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from .catalogue import fields, groups, variable_name

_SHOWN_CHARS = 100
_ALIKE = 0.8
_NO_SIZE = "this is not a size like 536870912, 512MiB, 512Mi or 1GB"


def explain_problem(problem: Any, origins: Mapping[str, str], prefix: str) -> str:
    """One line about a value that pydantic refused.

    Args:
        problem: one of ``ValidationError.errors()``.
        origins: dotted name -> where the layer sets it.
        prefix: what the layer leaves out of names.
    """

    def shown_name(name: str) -> str:
        return name.removeprefix(prefix)

    dotted = ".".join(str(part) for part in problem["loc"])
    origin = origins.get(dotted) or next(
        (where for name, where in origins.items() if dotted.startswith(f"{name}.")), "settings"
    )
    shown = shown_name(dotted)
    if problem["type"] == "extra_forbidden":
        group = prefix.rstrip(".") or dotted.rpartition(".")[0]
        return f"{origin}: there is no setting {shown}{_suggestions(dotted, group, shown_name)}"
    if dotted in groups():
        return f"{origin}: {shown} is a group of settings, not a setting: put them below it"
    given = repr(problem["input"])
    given = given if len(given) <= _SHOWN_CHARS else f"{given[:_SHOWN_CHARS]}…"
    what = _NO_SIZE if problem["type"].startswith("byte_size") else str(problem["msg"]).removeprefix("Value error, ")
    return f"{origin}: {shown} = {given}: {what}"


def explain_unknown_variable(variable: str, dotted: str) -> str:
    """One line about a variable that begins as ours do and sets nothing; ``dotted``: the setting that it would set."""
    names = {_with_single_underscores(name): name for name in fields()}
    near = difflib.get_close_matches(_with_single_underscores(dotted), names, n=1, cutoff=_ALIKE)
    if near:
        meant = variable_name(names[near[0]])
        return f"{variable}: there is no such setting; did you mean {meant}? (engine-loader settings --env lists all)"
    return f"{variable}: there is no such setting{_suggestions(dotted, dotted.rpartition('.')[0], variable_name)}"


def _with_single_underscores(dotted: str) -> str:
    return re.sub(r"[._]+", "_", dotted)


def explain_yaml_error(path: str, error: yaml.YAMLError) -> str:
    """One line about a file that is not YAML, with the line where parsing stopped."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path} is not valid YAML: {' '.join(str(error).split())}"
    what = [text for text in (getattr(error, "context", None), getattr(error, "problem", None)) if text]
    return f"{path}:{mark.line + 1}: not valid YAML: {', '.join(what)}"


def _suggestions(dotted: str, group: str, show: Callable[[str], str]) -> str:
    """The setting whose name is closest to ``dotted``, and all names of its group, each written by ``show``."""
    group = group if group in groups() else ""
    there = [name for name in (*fields(), *sorted(groups())) if name.rpartition(".")[0] == group]
    lasts = {name.rpartition(".")[2]: name for name in there}
    near = [lasts[last] for last in difflib.get_close_matches(dotted.removeprefix(f"{group}."), lasts, n=1)]
    if not near and not group:
        # A setting without its group: "threads" for "loader.threads".
        near = difflib.get_close_matches(dotted, fields(), n=1)
    meant = f"; did you mean {show(near[0])}?" if near else ""
    return f"{meant} (there are: {', '.join(show(f'{name}.…' if name in groups() else name) for name in there)})"
