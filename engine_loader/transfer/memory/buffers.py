"""Buffers that are counted and reused.

A buffer is handed out as a *lease*, an object that exports the buffer's memory. Tensors made over a lease keep it
alive; when the last one is gone, so is the lease, and the buffer goes back to the pool. So no tensor ever sees its
memory reused.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections import deque
from dataclasses import dataclass

from ...errors import CheckpointError
from ...failures import errno_hint

_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)


@dataclass(slots=True, eq=False)
class _Buffer:
    memory: mmap.mmap
    capacity: int


@dataclass(slots=True, eq=False)
class Lease:
    """A buffer in use.

    Attributes:
        memory: exports the buffer's bytes; whoever holds it, or a tensor over it, holds the buffer.
        address: of the first byte; a multiple of the page size.
        capacity: bytes.
    """

    memory: ctypes.Array[ctypes.c_char]
    address: int
    capacity: int
    number: int


class BufferPool:
    """Memory for streaming, bounded by a budget.

    The budget covers the buffers that are free, being filled, or just handed out. A buffer whose tensors the consumer
    keeps is written off (``disown``): it is the consumer's memory from then on. The pool is used from one thread;
    leases may end on any.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self._free: list[_Buffer] = []
        self._leased: dict[int, tuple[_Buffer, weakref.ref[ctypes.Array[ctypes.c_char]]]] = {}
        # Filled by weak-reference callbacks, which can run at any moment of any thread: appending is all they may do.
        self._returned: deque[int] = deque()
        self._next_number = 0

    def lease(self, nbytes: int, *, force: bool = False) -> Lease | None:
        """A buffer of at least ``nbytes``; None when that would exceed the budget and ``force`` is off."""
        self._collect()
        buffer = self._reuse(nbytes)
        if buffer is None:
            capacity = _rounded(nbytes)
            self._shrink(self.budget_bytes - capacity)
            if self.allocated_bytes + capacity > self.budget_bytes and not force:
                return None
            buffer = self._allocate(capacity)
        memory = (ctypes.c_char * buffer.capacity).from_buffer(buffer.memory)
        number = self._next_number
        self._next_number += 1
        returned = self._returned
        self._leased[number] = (buffer, weakref.ref(memory, lambda _: returned.append(number)))
        return Lease(memory, ctypes.addressof(memory), buffer.capacity, number)

    def disown(self, number: int) -> None:
        """Stop counting lease ``number`` if it is still held: its holder keeps it, and frees it by letting go."""
        self._collect()
        held = self._leased.pop(number, None)
        if held is not None:
            self.allocated_bytes -= held[0].capacity

    def _allocate(self, capacity: int) -> _Buffer:
        try:
            memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise CheckpointError(
                f"no memory for a buffer of {capacity} bytes: {error.strerror}", hint=errno_hint(error.errno)
            ) from None
        if _MADV_HUGEPAGE is not None and capacity >= _HUGE_PAGE_BYTES:
            # A kernel without huge pages refuses; the buffer works as well, only its first use is slower.
            with contextlib.suppress(OSError):
                memory.madvise(_MADV_HUGEPAGE)
        self.allocated_bytes += capacity
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        return _Buffer(memory, capacity)

    def _reuse(self, nbytes: int) -> _Buffer | None:
        # The last one freed is the likeliest to be in the processor's cache. One much larger stays for a larger need.
        for position in range(len(self._free) - 1, -1, -1):
            if nbytes <= self._free[position].capacity <= 2 * _rounded(nbytes):
                return self._free.pop(position)
        return None

    def _shrink(self, target_bytes: int) -> None:
        while self._free and self.allocated_bytes > target_bytes:
            self.allocated_bytes -= self._free.pop(0).capacity

    def _collect(self) -> None:
        while self._returned:
            held = self._leased.pop(self._returned.popleft(), None)
            if held is not None:
                self._free.append(held[0])


def _rounded(nbytes: int) -> int:
    unit = _HUGE_PAGE_BYTES if nbytes >= _HUGE_PAGE_BYTES else mmap.PAGESIZE
    return max(unit, -(-nbytes // unit) * unit)
