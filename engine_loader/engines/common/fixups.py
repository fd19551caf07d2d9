"""Faults of engines that keep a restored cache from being used, repaired at run time.

Each fix-up is guarded by the very lines that it replaces: where those are not there, nothing is changed, in whatever
version. The same changes are patch files in `patches/`. The setting `compile_cache.fixups` switches fix-ups off,
`engine-loader doctor` lists them.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compile_cache.host.versions import NONE, module_version
from ...settings import load_settings

logger = logging.getLogger("vllm.engine_loader")


@dataclass(frozen=True)
class Fixup:
    """A change of one function of an engine, or of a library that it compiles with.

    Attributes:
        name: as `engine-loader doctor` shows it.
        distribution: the name of the package that has the fault. vLLM's CPU build is installed under another name than
            its package `vllm`, which counts.
        module: the module that is changed, after it was imported.
        read_up_to: the last version (major, minor) whose source was read for this fix-up. It does not guard it.
        upstream: the lines of the module's source that the change replaces.
        why: what goes wrong with these lines.
        patch: the file in `patches/` with the same change.
        apply: makes the change in the imported module; a second call does nothing.
    """

    name: str
    distribution: str
    module: str
    read_up_to: tuple[int, int]
    upstream: str
    why: str
    patch: str
    apply: Callable[[Any], None]

    def state(self) -> str:
        """Return "needed", or why the installed version does not need it. The distribution is not imported."""
        name = self.distribution
        installed, top = self._installed(), importlib.util.find_spec(name)
        if installed is None or top is None or not top.origin:
            return f"{name} is not installed"
        source = Path(top.origin).parent.joinpath(*self.module.split(".")[1:]).with_suffix(".py")
        try:
            there = self.upstream in source.read_text()
        except OSError:
            return f"{name} {installed[0]}.{installed[1]} has no {self.module}"
        return "needed" if there else "these lines are not there (patched, or changed)"

    def unread(self) -> str | None:
        """A remark if the installed version is newer than what was read for this fix-up; else None."""
        installed = self._installed()
        if installed is None or installed <= self.read_up_to:
            return None
        read = ".".join(map(str, self.read_up_to))
        return (
            f"{self.distribution} {installed[0]}.{installed[1]} is newer than {read}, up to which its source was read"
        )

    def _installed(self) -> tuple[int, int] | None:
        text = module_version(self.distribution)
        return None if text == NONE else _release(text)


def apply_needed(fixups: Iterable[Fixup], module: Any) -> None:
    """Make the changes in the imported ``module`` that the installed version needs; none if the setting is off.

    Where a change does not fit any more, a warning says so, and the others are made.
    """
    if not load_settings().settings.compile_cache.fixups:
        return
    for fixup in fixups:
        if fixup.state() != "needed":
            continue
        try:
            fixup.apply(module)
        except AttributeError as error:
            logger.warning(
                "compile cache: the fix-up %s was not applied: %s; %s. Until then: %s",
                fixup.name,
                error,
                fixup.unread() or "the installed package was changed",
                fixup.why,
            )
            continue
        logger.debug("compile cache: applied the fix-up %s", fixup.name)


def _release(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
