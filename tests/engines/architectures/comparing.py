"""Loads a checkpoint by vLLM's own loader and by ours in each of its modes, and says what differs."""

from __future__ import annotations

import gc
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import vllm_inprocess
from tests.support.vllm_inprocess import State, differences, state_of

from .checkpoints import arguments_of, made_by_transformers, make_checkpoint

MODES: dict[str, tuple[dict[str, Any], int | None]] = {
    "direct": ({"mode": "direct"}, None),
    "recorded": ({"mode": "direct"}, 0),
    "stream": ({"mode": "stream"}, None),
}
"""Name -> options of the loader, and up to which size direct mode reads tensors whole instead of recording them."""


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        architecture: its name in vLLM's registry.
        as_asked: its weights are what vLLM's model asks for, not those of transformers' class.
        tensors: how many parameters and buffers were compared.
        differing: mode -> what differs, or how the load failed there though vLLM's own loader loads the checkpoint.
        obstacle: why there is nothing to compare: the checkpoint cannot be made, or vLLM's own loader does not load it.
        seconds: how long all of it took.
    """

    architecture: str
    as_asked: bool = False
    tensors: int = 0
    differing: dict[str, list[str]] = field(default_factory=dict)
    obstacle: str | None = None
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether it was loaded, and equal in all modes."""
        return self.obstacle is None and not self.differing


def compare(architecture: str, modes: Iterable[str] = MODES) -> Outcome:
    """Make a tiny checkpoint of ``architecture`` and load it by vLLM's own loader and by ours."""
    started, outcome = time.monotonic(), Outcome(architecture)
    for as_asked in [False, True] if made_by_transformers(architecture) else [True]:
        with tempfile.TemporaryDirectory(prefix="architecture-") as scratch:
            try:
                directory = make_checkpoint(architecture, scratch, as_asked=as_asked)
                arguments = arguments_of(architecture, directory)
                expected = load(directory, "auto", {}, **arguments)
            except Exception as error:
                outcome.obstacle = outcome.obstacle or told(error)
                continue
            outcome.obstacle, outcome.as_asked, outcome.tensors = None, as_asked, len(expected)
            outcome.differing = compare_modes(directory, expected, modes, **arguments)
            break
    outcome.seconds = time.monotonic() - started
    return outcome


def compare_modes(
    directory: Path, expected: State, modes: Iterable[str] = MODES, **arguments: Any
) -> dict[str, list[str]]:
    """Mode -> what differs from ``expected`` when our loader loads ``directory``."""
    differing = {}
    for mode in modes:
        options, small_bytes = MODES[mode]
        try:
            found = differences(expected, load(directory, "b10_3fs", options, small_bytes, **arguments))
        except Exception as error:
            found = [told(error)]
        if found:
            differing[mode] = found
    return differing


def load(
    directory: Path, load_format: str, options: Mapping[str, Any], small_bytes: int | None = None, **arguments: Any
) -> State:
    """Every parameter and buffer of the model after loading."""
    with ExitStack() as stack:
        if small_bytes is not None:
            stack.enter_context(mock.patch("engine_loader.loading.direct.load.SMALL_BYTES", small_bytes))
        model = vllm_inprocess.load_model(directory, load_format, options, **arguments)
    state = state_of(model)
    del model
    gc.collect()
    return state


def told(error: BaseException) -> str:
    """One line: what was raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = textwrap.shorten(str(error), 240, placeholder=" …")
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"
