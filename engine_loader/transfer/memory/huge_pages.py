"""Huge pages for memory that is about to be filled: to make pages costs more than to copy into them."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterable, Iterator, Sequence

import torch

# Allocators put a header between two tensors; huge pages may span it. More would be memory that nobody asked for.
_BRIDGED_BYTES = 64 << 10
_HUGE_PAGE_BYTES = 2 << 20
_TIMED = 4
"""Pages of each kind: 16 MiB in all."""
_WORTH_A_TRIAL_BYTES = 64 << 20
_MADV_POPULATE_WRITE = 23


def ask_for_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Have the pages of CPU tensors that do not exist yet made as huge pages, where the kernel grants it and a few that
    are made first do not take longer than small ones would.

    To be called between allocating parameters and copying into them, as by ``tensors()`` of a checkpoint: memory that
    has never been written gets its pages with the first write, and 512 small ones mostly take several times as long as
    a huge one. Where a host has taken free memory back from a virtual machine, it is the other way round. ``load_into``
    and the adapters of engines do it by themselves. It changes no contents; tensors on other devices are left alone,
    and so is all memory where the system has no transparent huge pages (see ``engine-loader doctor``).

    Args:
        tensors: parameters, buffers, any others; they may share memory.
    """
    ranges = list(_merged(sorted(_ranges(tensors))))
    if not _is_slow(ranges):
        _advise_all(ranges)


def advise_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """``ask_for_huge_pages`` whatever they cost."""
    _advise_all(_merged(sorted(_ranges(tensors))))


def _advise_all(ranges: Iterable[tuple[int, int]]) -> None:
    for begin, end in ranges:
        # The kernel looks for whole huge pages inside by itself, but wants the beginning of a page. Its answer does not
        # matter: memory that cannot have huge pages does without.
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if first < end:
            _madvise(first, end - first, mmap.MADV_HUGEPAGE)


def _is_slow(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether the first huge pages of the largest range take longer than small ones of as many bytes beside them."""
    begin, end = max(ranges, key=lambda found: found[1] - found[0], default=(0, 0))
    first = -(-begin // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    if end - first < _WORTH_A_TRIAL_BYTES:
        return False
    places = [first + number * _HUGE_PAGE_BYTES for number in range(2 * _TIMED)]
    left = 0
    for place in places[:_TIMED]:
        small = _time_to_make(place, mmap.MADV_NOHUGEPAGE)
        if small is None:
            return False
        left += small
    for place in places[_TIMED:]:
        huge = _time_to_make(place, mmap.MADV_HUGEPAGE)
        if huge is None:
            return False
        left -= huge
        if left < 0:  # a single one may have taken as long as ten of the small ones
            return True
    return False


def _time_to_make(place: int, advice: int) -> int | None:
    """CPU time in ns for what a huge page holds; None where it is there already, or the kernel cannot make it early."""
    state = (ctypes.c_ubyte * (_HUGE_PAGE_BYTES // mmap.PAGESIZE))()
    length = ctypes.c_size_t(_HUGE_PAGE_BYTES)
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(place), length, state) != 0 or any(byte & 1 for byte in state):
        return None
    _madvise(place, _HUGE_PAGE_BYTES, advice)
    # Turns that other threads take do not count, and what the host takes to give the memory does.
    began = time.thread_time_ns()
    made = _madvise(place, _HUGE_PAGE_BYTES, _MADV_POPULATE_WRITE)
    return time.thread_time_ns() - began if made else None


def _madvise(begin: int, nbytes: int, advice: int) -> bool:
    return bool(ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), advice) == 0)


def _ranges(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """(first address, end) of each tensor's memory, as far as it has some here."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            continue
        try:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
        except (RuntimeError, NotImplementedError):  # a wrapper that keeps its data elsewhere
            continue
        if address:
            yield address, address + storage.nbytes()


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges, those that lie close together as one."""
    begin = end = -1
    for first, last in ranges:
        if end < 0 or first > end + _BRIDGED_BYTES:
            if end > begin:
                yield begin, end
            begin = first
        end = max(end, last)
    if end > begin:
        yield begin, end
