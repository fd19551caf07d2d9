"""Faults of known versions that keep a restored cache from being used, repaired at run time.

Each fix-up is guarded by the version and by the very lines that it replaces: where those are not there, nothing is
changed. The same changes are patch files in `patches/`. The setting `compile_cache.fixups` switches fix-ups off,
`engine-loader doctor` lists them.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...settings import load_settings

logger = logging.getLogger("vllm.engine_loader")


@dataclass(frozen=True)
class Fixup:
    """A change of one function of an engine, or of a library that it compiles with.

    Attributes:
        name: as `engine-loader doctor` shows it.
        distribution: the installed distribution that has the fault.
        module: the module that is changed, after it was imported.
        first, last: the first and the last version (major, minor) that have the fault.
        upstream: the lines of the module's source that the change replaces.
        why: what goes wrong with these lines.
        patch: the file in `patches/` with the same change.
        apply: makes the change in the imported module; a second call does nothing.
    """

    name: str
    distribution: str
    module: str
    first: tuple[int, int]
    last: tuple[int, int]
    upstream: str
    why: str
    patch: str
    apply: Callable[[Any], None]

    def state(self) -> str:
        """Return "needed", or why the installed version does not need it. The distribution is not imported."""
        name = self.distribution
        try:
            installed = _release(version(name))
        except PackageNotFoundError:
            return f"{name} is not installed"
        if not self.first <= installed <= self.last:
            return f"{name} {installed[0]}.{installed[1]} does not have this fault"
        top = importlib.util.find_spec(name)
        if top is None or not top.origin:
            return f"{name} is not installed"
        source = Path(top.origin).parent.joinpath(*self.module.split(".")[1:]).with_suffix(".py")
        try:
            return (
                "needed" if self.upstream in source.read_text() else "these lines are not there (patched, or changed)"
            )
        except OSError:
            return f"{name} {installed[0]}.{installed[1]} has no {self.module}"


def apply_needed(fixups: Iterable[Fixup], module: Any) -> None:
    """Make the changes in the imported ``module`` that the installed version needs; none if the setting is off."""
    if not load_settings().settings.compile_cache.fixups:
        return
    for fixup in fixups:
        if fixup.state() == "needed":
            fixup.apply(module)
            logger.debug("compile cache: applied the fix-up %s", fixup.name)


def _release(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
