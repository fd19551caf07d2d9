"""Faults of known versions that keep a restored cache from being used, mended at run time.

Each fix-up is guarded by the version and by the very lines that it replaces: where those are not there, nothing is
touched. The same changes are patch files in `patches/`, for those who prefer to patch. `compile_cache.fixups` switches
them off, `engine-loader doctor` lists them.
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

APPLIED = "_engine_loader_fixup"


@dataclass(frozen=True)
class Fixup:
    """A change of one function of an engine, or of a library that it compiles with.

    Attributes:
        name: for people.
        distribution: that has the fault, as it is installed.
        module: the change is made after it was imported.
        first, last: the versions (major, minor) that have the fault.
        upstream: the lines that the change replaces, as they are there.
        why: what goes wrong with them.
        patch: the file in `patches/` with the same change.
        apply: makes the change in the imported module.
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
        """Whether it is needed by what is installed: "needed", or why not. Imports nothing of it."""
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
    """Make those changes in the imported ``module`` that the installed version needs."""
    if not load_settings().settings.compile_cache.fixups:
        return
    for fixup in fixups:
        if fixup.state() == "needed":
            fixup.apply(module)
            logger.debug("compile cache: applied the fix-up %s", fixup.name)


def _release(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
