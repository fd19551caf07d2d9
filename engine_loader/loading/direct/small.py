"""Small tensors of a load in direct mode, which are read whole, in batches ahead of the engine's code.

To read a small tensor and copy it costs less than to record its copies, and engines often need the values of scales and
norms.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from ...formats.safetensors import TensorInfo
from ...transfer.plan import ExtentRow, extent
from ...transfer.protocol import Transfer
from .torch_private import address_of, without_dispatch

# Two batches are in memory at once, beside what the engine still holds of earlier ones.
_BATCH_BYTES = 4 << 20
_BATCH_TENSORS = 4096
Submit = Callable[[Sequence[TensorInfo], Sequence[ExtentRow], object], Transfer | None]


class SmallTensors:
    """Tensors that will be asked for in the order in which they are given here.

    Args:
        infos: the tensors.
        file_number: returns the number of a tensor's file in the plan.
        submit: called with a batch's tensors, their extents, and the object that keeps the destinations alive; starts
            to read. None: the batch has no bytes.
        wait: called with the transfer that ``submit`` returned, to wait for it.
    """

    def __init__(
        self,
        infos: Iterable[TensorInfo],
        *,
        file_number: Callable[[TensorInfo], int],
        submit: Submit,
        wait: Callable[[Transfer], object],
    ) -> None:
        self._file_number = file_number
        self._submit = submit
        self._wait = wait
        self._infos = deque(infos)
        self._expected = {id(info) for info in self._infos}
        self._ready: dict[int, torch.Tensor] = {}
        self._coming: dict[int, torch.Tensor] = {}
        self._transfer: Transfer | None = None
        self._start()

    def has(self, info: TensorInfo) -> bool:
        """Whether the tensor is one of these."""
        return id(info) in self._expected

    def take(self, info: TensorInfo) -> torch.Tensor:
        """The next of these tensors, with its data.

        Raises:
            CheckpointError: its bytes could not be read.
        """
        if not self._ready:
            if self._transfer is not None:
                self._wait(self._transfer)
            self._ready, self._coming, self._transfer = self._coming, {}, None
            self._start()
        return self._ready.pop(id(info))

    def cancel(self) -> None:
        """Give up what is being read; nothing is written to memory when this returns."""
        if self._transfer is not None:
            self._transfer.cancel()

    def _start(self) -> None:
        batch: list[TensorInfo] = []
        nbytes = 0
        while self._infos and len(batch) < _BATCH_TENSORS and nbytes < _BATCH_BYTES:
            batch.append(self._infos.popleft())
            nbytes += batch[-1].nbytes
        if not batch:
            return
        extents: list[ExtentRow] = []
        with without_dispatch():  # no copies into new memory are pending
            for info in batch:
                dtype, shape = info.as_torch()
                target = self._coming[id(info)] = torch.empty(shape, dtype=dtype, device="cpu")
                if info.nbytes:
                    extents.append(extent(self._file_number(info), info.offset, info.nbytes, address_of(target)))
        self._transfer = self._submit(batch, extents, self._coming)
