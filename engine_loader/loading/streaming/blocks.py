"""Blocks: consecutive tensors that are brought into memory together."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from ctypes import Array, c_char
from dataclasses import dataclass, field

import torch

from ...formats.dtypes import DTYPE_BITS
from ...formats.safetensors import TensorInfo

# A tensor as small as this is copied out of its block: whoever keeps a scale must not keep megabytes alive with it.
_COPIED_BYTES = 16 << 10
# Mapped blocks leap over what is not wanted when it is larger than this.
_GAP_BYTES = 64 << 10
_DEVICE_ALIGN = 256


@dataclass(slots=True)
class Block:
    """Consecutive tensors, where each lies in the block's memory, and how much memory that is."""

    tensors: list[TensorInfo] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    nbytes: int = 0

    def add(self, info: TensorInfo, position: int) -> None:
        """Put a tensor at ``position``."""
        self.tensors.append(info)
        self.positions.append(position)
        self.nbytes = max(self.nbytes, position + info.nbytes)


def packed_blocks(infos: Iterable[TensorInfo], block_bytes: int) -> Iterator[Block]:
    """Blocks to be read into buffers: every tensor gets an aligned position.

    The first lies at its file offset modulo the page size, so that neighbours in the file are mostly neighbours in
    memory and direct IO needs no copy.
    """
    return _packed(infos, block_bytes, lambda info, begin: _aligned(begin or info.offset % mmap.PAGESIZE, info.dtype))


def device_blocks(infos: Iterable[TensorInfo], block_bytes: int) -> Iterator[Block]:
    """Blocks to be read into the memory of a device; every tensor is aligned as torch's allocator aligns."""
    return _packed(infos, block_bytes, lambda info, begin: -(-begin // _DEVICE_ALIGN) * _DEVICE_ALIGN)


def _packed(infos: Iterable[TensorInfo], block_bytes: int, align: Callable[[TensorInfo, int], int]) -> Iterator[Block]:
    """Blocks whose tensors lie at the first position, from a given one on, that ``align`` allows."""
    block = Block()
    for info in infos:
        position = align(info, block.nbytes)
        if block.tensors and position + info.nbytes > block_bytes:
            yield block
            block = Block()
            position = align(info, 0)
        block.add(info, position)
    if block.tensors:
        yield block


def file_blocks(infos: Iterable[TensorInfo], block_bytes: int) -> Iterator[Block]:
    """Blocks to be mapped: a block is a part of one file, from the page that its first tensor begins in."""
    block = Block()
    for info in infos:
        if block.tensors:
            first, last = block.tensors[0], block.tensors[-1]
            position = info.offset - first.offset + block.positions[0]
            gap = info.offset - last.offset - last.nbytes
            if info.file == first.file and 0 <= gap <= _GAP_BYTES and position + info.nbytes <= block_bytes:
                block.add(info, position)
                continue
            yield block
            block = Block()
        block.add(info, info.offset % mmap.PAGESIZE)
    if block.tensors:
        yield block


def block_tensor(memory: Array[c_char], info: TensorInfo, position: int) -> torch.Tensor:
    """The tensor at ``position`` of a block's memory. It keeps the memory alive, or has its own."""
    if not info.nbytes:
        dtype, shape = info.as_torch()
        return torch.empty(shape, dtype=dtype, device="cpu")
    return shaped(torch.frombuffer(memory, dtype=torch.uint8, count=info.nbytes, offset=position), info, position)


def shaped(content: torch.Tensor, info: TensorInfo, position: int) -> torch.Tensor:
    """The tensor whose bytes are ``content``, at ``position`` of its block. It keeps them alive, or has its own."""
    dtype, shape = info.as_torch()
    if info.nbytes <= _COPIED_BYTES or position % dtype.itemsize:
        # Copied as bytes: a copy of booleans would make every byte 0 or 1.
        content = content.clone()
    return content.view(dtype).view(shape)


def _aligned(position: int, dtype: str) -> int:
    itemsize = max(1, DTYPE_BITS[dtype] // 8)
    return -(-position // itemsize) * itemsize
