"""Copies that were recorded and may not have been carried out yet: batches, and which memory waits for which batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from ...transfer.plan import ExtentRow
from ...transfer.protocol import Transfer
from .copies import WrittenMemory, has_own_memory
from .torch_private import storage_id, storage_of

# A batch goes to the reader threads when it has reached one of these.
_BATCH_BYTES = 32 << 20
_BATCH_EXTENTS = 1024


class BatchFiles(Protocol):
    """The files that the copies of a batch read from."""

    def submit(self, extents: Sequence[ExtentRow], owner: object, device: int | None) -> Transfer:
        """Start to read ``extents``; ``owner`` keeps their destinations alive."""
        ...

    def wait(self, transfer: Transfer, timeout_s: float | None) -> bool:
        """Wait for a transfer; False when ``timeout_s`` ran out first."""
        ...

    def show_in_flight(self, nbytes: int) -> None:
        """Update the progress: of what was offered, all but ``nbytes`` has arrived."""
        ...


@dataclass(slots=True)
class _Batch:
    """Copies that go to the reader threads together: all from one set of files to one device (None: CPU memory)."""

    number: int
    files: BatchFiles | None = None
    device: int | None = None
    extents: list[ExtentRow] = field(default_factory=list)
    owners: list[object] = field(default_factory=list)
    nbytes: int = 0


class _InFlight(NamedTuple):
    batch: _Batch
    files: BatchFiles
    transfer: Transfer


class PendingCopies:
    """Gathers recorded copies into batches and has them carried out, in order. Not safe for threads by itself.

    Args:
        execute: False: batches count as complete at once, and nothing is read.
    """

    def __init__(self, *, execute: bool) -> None:
        self._execute = execute
        self._batch = _Batch(1)
        self._in_flight: deque[_InFlight] = deque()
        self._completed = 0
        self._written: dict[int, WrittenMemory] = {}

    def any(self) -> bool:
        """Whether any copy is pending."""
        return bool(self._in_flight or self._batch.extents)

    def add(
        self, files: BatchFiles, target: torch.Tensor, device: int | None, extents: Sequence[ExtentRow], nbytes: int
    ) -> WrittenMemory:
        """Take a copy of ``nbytes`` bytes into ``target``; returns what is known of the target's memory.

        Raises:
            CheckpointError: an earlier copy failed.
        """
        storage = storage_of(target)
        memory = self._memory_of(storage)
        if memory.overlaps(extents):
            # The later copy wins, so the earlier one must be complete.
            self.wait_for(memory)
        if self._batch.files is not files or self._batch.device != device:
            self.submit()
            self._batch.files, self._batch.device = files, device
        batch = self._batch
        memory.add(extents)
        memory.last_batch = batch.number
        batch.extents += extents
        batch.owners.append(storage)  # not the tensor, which may be given other memory
        batch.nbytes += nbytes
        if batch.nbytes >= _BATCH_BYTES or len(batch.extents) >= _BATCH_EXTENTS:
            self.submit()
        return memory

    def expose(self, tensor: torch.Tensor) -> None:
        """Mark the tensor's memory as exposed; see ``WrittenMemory.exposed``."""
        self._memory_of(storage_of(tensor)).exposed = True

    def settle(self, tensor: torch.Tensor) -> None:
        """Wait for the pending copies into the tensor's memory; for all where it is not known where that is."""
        if not has_own_memory(tensor):
            self._wait_for_batch(self._batch.number)
            return
        memory = self._written.get(storage_id(storage_of(tensor)))
        if memory is not None and tensor.numel():
            self.wait_for(memory)

    def wait_for(self, memory: WrittenMemory) -> None:
        """Wait for the pending copies into ``memory``."""
        self._wait_for_batch(memory.last_batch)

    def submit(self) -> None:
        """Hand what has been gathered to the reader threads."""
        batch = self._batch
        if batch.files is None or not batch.extents:
            return
        self._batch = _Batch(batch.number + 1, batch.files, batch.device)
        if not self._execute:
            self._completed = batch.number
            return
        transfer = batch.files.submit(batch.extents, batch.owners, batch.device)
        self._in_flight.append(_InFlight(batch, batch.files, transfer))
        while self._in_flight and self._wait_for_first(timeout_s=0):
            pass

    def complete(self) -> None:
        """Carry out all that is pending."""
        self.submit()
        while self._in_flight:
            self._wait_for_first()

    def cancel(self) -> None:
        """Give up what has not been read; nothing is written to any destination when this returns."""
        while self._in_flight:
            self._in_flight.pop().transfer.cancel()

    def _memory_of(self, storage: torch.UntypedStorage) -> WrittenMemory:
        number = storage_id(storage)
        memory = self._written.get(number)
        if memory is None:
            memory = self._written[number] = WrittenMemory()
        return memory

    def _wait_for_batch(self, number: int) -> None:
        if number == self._batch.number:
            self.submit()
        while self._in_flight and self._completed < number:
            self._wait_for_first()

    def _wait_for_first(self, timeout_s: float | None = None) -> bool:
        batch, files, transfer = self._in_flight[0]
        if not files.wait(transfer, timeout_s):
            return False
        self._in_flight.popleft()
        self._completed = batch.number
        files.show_in_flight(sum(other.batch.nbytes for other in self._in_flight if other.files is files))
        return True
