"""On which terms a process comes from a template, whatever the engine: the setting, its role, its environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from multiprocessing.process import BaseProcess

from ...errors import SettingsError
from ...settings import load_settings
from ...start.fitness import changed_variables, why_not_preloaded, why_not_with
from ...start.spawned import Role


def template_setting() -> str:
    """The setting ``start.template``; off where settings are wrong, which is said where the arguments are checked."""
    try:
        return load_settings().settings.start.template
    except SettingsError:
        return "off"


def role_among(roles: Mapping[tuple[str, str], Role], process: BaseProcess) -> Role | None:
    """The part of a process in a start, by the (module, name) of the function that it runs; None: it has none."""
    target = getattr(process, "_target", None)
    return roles.get((getattr(target, "__module__", ""), getattr(target, "__qualname__", "")))


def why_not_in(before: Mapping[str, str], now: Mapping[str, str], may_differ: re.Pattern[str]) -> str | None:
    """A reason against a child with the environment ``now``, from a process that has imported in ``before``.

    Args:
        before: the environment of the imports.
        now: that of the child.
        may_differ: matches names of variables that are read when they are used, or are seen to in the child.
    """
    reason = why_not_with(before, now, lambda name: may_differ.fullmatch(name) is not None)
    if reason is None and "LD_PRELOAD" in changed_variables(before, now):
        reason = why_not_preloaded(now.get("LD_PRELOAD", ""))
    return reason
