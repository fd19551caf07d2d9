"""Huge pages for memory that is about to be filled: to make pages costs more than to copy into them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator

import torch

# Allocators put a header between two tensors; huge pages may span it. More would be memory that nobody asked for.
_BRIDGED_BYTES = 64 << 10


def ask_for_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Have the pages of CPU tensors that do not exist yet made as huge pages, where the kernel grants it.

    To be called between allocating parameters and copying into them, as by ``tensors()`` of a checkpoint: memory that
    has never been written gets its pages with the first write, and 512 small ones take several times as long as a huge
    one. ``load_into`` and the adapters of engines do it by themselves. It changes no contents; tensors on other devices
    are left alone, and so is all memory where the system has no transparent huge pages (see ``engine-loader doctor``).

    Args:
        tensors: parameters, buffers, any others; they may share memory.
    """
    libc = ctypes.CDLL(None)
    for begin, end in _merged(sorted(_ranges(tensors))):
        # The kernel looks for whole huge pages inside by itself, but wants the beginning of a page. Its answer does not
        # matter: memory that cannot have huge pages does without.
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if first < end:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)


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
