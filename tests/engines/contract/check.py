"""Checks a version of an engine: its source against the expectations, and the lines that the fix-ups change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine_loader import plugin
from engine_loader.engines.common import torch_fixups
from engine_loader.engines.common.fixups import Fixup
from engine_loader.engines.vllm import fixups as vllm_fixups

from . import sglang, vllm
from .adapters import imported_by_adapter
from .expectations import Expected
from .source_tree import SourceTree

_LISTS: dict[str, Sequence[Expected]] = {"vllm": vllm.PRESENT, "sglang": sglang.PRESENT, "torch": ()}
FIXUPS: tuple[Fixup, ...] = (*vllm_fixups.FIXUPS, *torch_fixups.FIXUPS)


@dataclass(frozen=True)
class Report:
    """What was found in one version of an engine.

    Attributes:
        checked: how many expectations there are.
        moved: a line for each that is not met.
        remarks: a line for each that need not be there and is not, and for each fix-up.
    """

    checked: int
    moved: tuple[str, ...]
    remarks: tuple[str, ...]


def check(engine: str, tree: SourceTree) -> Report:
    """Check the source of ``engine`` (vllm, sglang or torch)."""
    listed = _LISTS[engine]
    optional = {expected.path for expected in listed if not expected.required}
    expected = [*listed, *_modules(engine), *(one for one in imported_by_adapter(engine) if one.path not in optional)]
    moved = tuple(filter(None, (one.moved(tree) for one in expected)))
    remarks = [f"{one.path} is not there: {one.why}" for one in expected if one.is_absent(tree)]
    return Report(len(expected), moved, (*remarks, *_fixups(engine, tree)))


def _modules(engine: str) -> Iterator[Expected]:
    """The modules whose import registers an adapter."""
    for module, adapter in (*plugin.ADAPTERS.items(), *plugin.PHASES.items()):
        if module.split(".")[0] == engine:
            yield Expected(module, f"{adapter} is registered when it is imported", required=False)


def _fixups(engine: str, tree: SourceTree) -> Iterator[str]:
    for fixup in FIXUPS:
        if fixup.distribution != engine:
            continue
        text = tree.text(fixup.module)
        if text is None:
            yield f"fix-up {fixup.name}: there is no {fixup.module}"
        else:
            lines = "its lines are there" if fixup.upstream in text else "its lines are not there: not needed"
            yield f"fix-up {fixup.name}: {lines}"
