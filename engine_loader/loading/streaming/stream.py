"""Streams (name, tensor) pairs: blocks of consecutive tensors are brought into memory ahead of the consumer.

A tensor that is handed out owns its bytes as long as anyone holds it. Beyond what the consumer keeps, the memory in use
is at most the budget; where a tensor does not fit into it, that tensor, which is read while the consumer still has the
one before it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch

from ...errors import CheckpointError
from ...formats.safetensors import TensorInfo
from ...report.load_report import LoadReport
from .blocks import Block
from .filling import Filler, Filling

AnyFiller: TypeAlias = Filler[Any]


def stream_tensors(
    infos: Iterable[TensorInfo], filler_of: Callable[[TensorInfo], AnyFiller], report: LoadReport
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, CPU tensor) for every one of ``infos``, in their order.

    Args:
        infos: the tensors; reading is fastest in file order.
        filler_of: how the file of a tensor is brought into memory.
        report: counts what is handed out, and the memory that it takes.

    Raises:
        CheckpointError: the bytes could not be read.
    """
    ahead = _ReadAhead(infos, filler_of)
    handed: deque[tuple[AnyFiller, Filling]] = deque()
    try:
        while (ready := ahead.next()) is not None:
            handed.append(ready)
            filling = ready[1]
            for index, info in enumerate(filling.block.tensors):
                yield info.name, filling.tensor(index)
                report.count_tensor(info)
            # The consumer's loop still holds the last tensor of this block, but nothing of the one before, unless it
            # keeps it.
            while len(handed) > 1:
                _pass(*handed.popleft())
        while handed:
            _pass(*handed.popleft())
        for filler in ahead.fillers:
            filler.finish()
    finally:
        ahead.abandon(handed)
        report.note_peak_buffer(sum(filler.peak_bytes for filler in ahead.fillers))


def _pass(filler: AnyFiller, filling: Filling) -> None:
    filler.passed(filling)


class _ReadAhead:
    """Keeps blocks in flight, as far as there is room."""

    def __init__(self, infos: Iterable[TensorInfo], filler_of: Callable[[TensorInfo], AnyFiller]) -> None:
        self.fillers: list[AnyFiller] = []
        self._planned = self._plan(infos, filler_of)
        self._flying: deque[tuple[AnyFiller, Filling]] = deque()
        self._refused: tuple[AnyFiller, Block] | None = None  # planned, but there was no room for it

    def next(self) -> tuple[AnyFiller, Filling] | None:
        """Wait for the next block in order; None at the end."""
        self._submit(force=True)
        if not self._flying:
            return None
        self._flying[0][1].wait()
        ready = self._flying.popleft()
        self._submit(force=False)
        return ready

    def abandon(self, handed: Iterable[tuple[AnyFiller, Filling]]) -> None:
        """Give up what is in flight; what was ``handed`` out stays valid. After the end there is nothing left to do."""
        # The last one first: else the threads would start on the next one whenever one is cancelled.
        while self._flying:
            self._flying.pop()[1].cancel()
        # The consumer stops for a reason of its own, or for an error that must not be hidden by another one.
        for filler, filling in handed:
            with contextlib.suppress(CheckpointError):
                filler.passed(filling)
        for filler in self.fillers:
            with contextlib.suppress(CheckpointError):
                filler.finish()

    def _plan(
        self, infos: Iterable[TensorInfo], filler_of: Callable[[TensorInfo], AnyFiller]
    ) -> Iterator[tuple[AnyFiller, Block]]:
        for filler, group in itertools.groupby(infos, filler_of):
            if filler not in self.fillers:
                self.fillers.append(filler)
            for block in filler.blocks(group):
                yield filler, block

    def _submit(self, *, force: bool) -> None:
        """Start filling blocks up to the bounds; ``force``: at least one, whether there is room or not."""
        while True:
            planned = self._refused or next(self._planned, None)
            if planned is None:
                return
            filler, block = self._refused = planned
            if len(self._flying) >= filler.blocks_ahead:
                return
            filling = filler.start(block, force=force and not self._flying)
            if filling is None:
                return
            self._refused = None
            self._flying.append((filler, filling))
