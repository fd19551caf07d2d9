"""Small tensors of a load in direct mode: to read one whole and to copy it costs less than to record its copies, and
scales and norms are often looked at, one by one. They are read in windows, ahead of the engine's code."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from ...formats.safetensors import TensorInfo
from ...transfer.plan import ExtentRow, extent
from ...transfer.protocol import Transfer

# Two windows are in memory at once, beside what the engine still holds of them.
_WINDOW_BYTES = 4 << 20
_WINDOW_TENSORS = 4096
Submit = Callable[[Sequence[TensorInfo], Sequence[ExtentRow], object], Transfer | None]


class SmallTensors:
    """Tensors that will be asked for in the order in which they are given here.

    Args:
        infos: the tensors.
        file_number: the number of a tensor's file in the extents.
        submit: starts reading a window: its tensors, the plan, and what keeps the destinations alive. None: there is
            nothing to wait for.
        wait: waits for what ``submit`` started.
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

    def take(self, info: TensorInfo) -> torch.Tensor | None:
        """The tensor, or None where it is none of these.

        Raises:
            CheckpointError: its bytes could not be read.
        """
        if not self.has(info):
            return None
        if not self._ready:
            if self._transfer is not None:
                self._wait(self._transfer)
            self._ready, self._coming, self._transfer = self._coming, {}, None
            self._start()
        return self._ready.pop(id(info))

    def cancel(self) -> None:
        """Give up what is being read."""
        if self._transfer is not None:
            self._transfer.cancel()

    def _start(self) -> None:
        window: list[TensorInfo] = []
        nbytes = 0
        while self._infos and len(window) < _WINDOW_TENSORS and nbytes < _WINDOW_BYTES:
            window.append(self._infos.popleft())
            nbytes += window[-1].nbytes
        if not window:
            return
        extents: list[ExtentRow] = []
        with torch._C._DisableTorchDispatch():  # nobody needs to know of these
            for info in window:
                dtype, shape = info.as_torch()
                target = self._coming[id(info)] = torch.empty(shape, dtype=dtype, device="cpu")
                if info.nbytes:
                    address = torch._C.TensorBase.data_ptr(target)
                    extents.append(extent(self._file_number(info), info.offset, info.nbytes, address))
        self._transfer = self._submit(window, extents, self._coming)
