"""Device memory as torch has it: which tensors native reader threads can fill, after which stream, and fresh blocks."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Protocol

import torch

from ...transfer.native.device_errors import obstacle_to_devices
from .trial import obstacle_on

if TYPE_CHECKING:
    from ...settings import LoaderSettings

logger = logging.getLogger(__name__)

_trying = threading.Lock()
_tried: dict[tuple[int, str | None], str | None] = {}  # what came of it, by device and runtime


class Devices(Protocol):
    """What loading asks of the devices."""

    def index(self, device: torch.device) -> int:
        """The runtime's number of a device of torch.cuda."""
        ...

    def number(self, device: torch.device) -> int | None:
        """The runtime's number of a device that native reader threads can fill; None: they cannot, or the CPU's."""
        ...

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The same for the device that holds a tensor."""
        ...

    def stream(self, number: int) -> int:
        """The stream whose work on a device comes before what is submitted now: the caller's current one."""
        ...

    def synchronize(self, number: int) -> None:
        """Wait for what is on that stream."""
        ...

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Fresh bytes on a device. They are its allocator's again when the last view of them is gone."""
        ...

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in the CPU's memory."""
        ...


class CudaDevices:
    """Those of torch.cuda, which are ROCm's, too.

    torch's caching allocator hands memory out again on the stream on which it was freed, so whoever used it before is
    waited for with the current stream. Nothing has to be recorded for the library's own streams: it holds the memory
    until its copies have ended.
    """

    def __init__(self, settings: LoaderSettings) -> None:
        self._obstacle: str | None = None
        self._asked = settings.engine in ("python", "mock")
        if self._asked:
            self._obstacle = "engine is set to python"
        self._runtime = settings.device_runtime
        self._settings = settings
        self._usable: dict[int, bool] = {}  # by number; asked for with every tensor

    def obstacle(self) -> str | None:
        """Why native reader threads cannot put bytes on these devices, if so."""
        if not self._asked:
            self._obstacle = obstacle_to_devices(self._runtime)
            self._asked = True
        return self._obstacle

    def index(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    def number(self, device: torch.device) -> int | None:
        if device.type != "cuda":
            return None
        number = self.index(device)
        if number not in self._usable:
            self._usable[number] = self.obstacle() is None and self.obstacle_on(number) is None
        return number if self._usable[number] else None

    def obstacle_on(self, number: int) -> str | None:
        """Why it should not do so on a device of this number, if so: the first time it is tried out there."""
        key = (number, self._runtime)
        with _trying:
            if key not in _tried:
                device = torch.device("cuda", number)
                _tried[key] = obstacle_on(self, device, number, self._settings)
                if _tried[key]:
                    logger.warning("%s; torch copies instead", _tried[key])
            return _tried[key]

    def number_of(self, tensor: torch.Tensor) -> int | None:
        return self.number(tensor.device) if tensor.is_cuda else None

    def stream(self, number: int) -> int:
        return int(torch.cuda.current_stream(number).cuda_stream)

    def synchronize(self, number: int) -> None:
        torch.cuda.current_stream(number).synchronize()

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def free_bytes(self, number: int) -> int:
        """Memory of a device that is available: what the driver has left, and what torch's allocator keeps unused."""
        unused = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
        return int(torch.cuda.mem_get_info(number)[0]) + unused
