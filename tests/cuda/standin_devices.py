"""The stand-in for the CUDA runtime as Python sees it, and its device as loading sees those of torch."""

from __future__ import annotations

import ctypes
import time
import weakref
from pathlib import Path

import torch

DEFAULT_STREAM = 0
ILLEGAL_ADDRESS = 700


class _Live(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("pinned", "streams", "events", "allocations"))


class StandIn:
    """The library; see standin/standin.h.

    Attributes:
        path: of the library, for the setting device_runtime.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.standin_malloc.restype = ctypes.c_void_p
        self._library.standin_in_flight.restype = ctypes.c_uint64
        self._library.standin_violations.restype = ctypes.c_uint64

    def reset(self) -> None:
        self._library.standin_reset(ctypes.c_uint64(1))

    def delay(self, most_us: int) -> None:
        self._library.standin_delay(most_us)

    def hold_stream(self, held: bool) -> None:
        """Hold the default stream, which owns all memory."""
        self._library.standin_hold(None, held)

    def hold_copies(self, held: bool) -> None:
        self._library.standin_hold_copies(held)

    def fail_copy(self, nth: int, error: int = ILLEGAL_ADDRESS) -> None:
        self._library.standin_fail_copy(nth, error)

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        """What a kernel on the default stream does, later."""
        address, nbytes = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        self._library.standin_fill(None, address, value, nbytes)

    def malloc(self, nbytes: int) -> int:
        return int(self._library.standin_malloc(ctypes.c_size_t(nbytes)))

    def free(self, address: int) -> None:
        self._library.standin_free(ctypes.c_void_p(address))

    def in_flight(self) -> int:
        return int(self._library.standin_in_flight())

    def idle(self) -> bool:
        """Whether nothing is left to do on the default stream."""
        return bool(self._library.standin_idle(None))

    def violations(self) -> tuple[int, str]:
        text = ctypes.create_string_buffer(200)
        return int(self._library.standin_violations(text, ctypes.c_size_t(len(text)))), text.value.decode()

    def live(self) -> dict[str, int]:
        live = _Live()
        self._library.standin_live(ctypes.byref(live))
        return {name: int(getattr(live, name)) for name, _ in _Live._fields_}


class StandInDevices:
    """One device, number 0, whose memory torch takes for the CPU's.

    Args:
        streaming: whether "cpu", as the place of tensors, means this device.

    Attributes:
        peak_bytes: the most memory of it that was in use at once.
    """

    def __init__(self, standin: StandIn, *, streaming: bool = False) -> None:
        self._standin = standin
        self._streaming = streaming
        self._blocks: dict[int, int] = {}
        self.peak_bytes = 0

    def index(self, device: torch.device) -> int:
        return 0

    def number(self, device: torch.device) -> int | None:
        return 0 if self._streaming else None

    def number_of(self, tensor: torch.Tensor) -> int | None:
        address = tensor.data_ptr()
        return 0 if any(begin <= address < begin + nbytes for begin, nbytes in self._blocks.items()) else None

    def stream(self, number: int) -> int:
        assert number == 0
        return DEFAULT_STREAM

    def synchronize(self, number: int) -> None:
        assert number == 0
        while not self._standin.idle():
            time.sleep(0.0001)

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Bytes that are freed, and poisoned, as soon as the last view of them is gone."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        address = self._standin.malloc(nbytes)
        memory = (ctypes.c_char * nbytes).from_address(address)
        self._blocks[address] = nbytes
        self.peak_bytes = max(self.peak_bytes, sum(self._blocks.values()))
        weakref.finalize(memory, self._free, address)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor on the device."""
        nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        return self.empty(nbytes, torch.device("cpu")).view(dtype).view(shape)

    def _free(self, address: int) -> None:
        del self._blocks[address]
        self._standin.free(address)
