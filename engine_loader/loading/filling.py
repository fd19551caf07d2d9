"""How the memory of a block is filled: by reading into pooled buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ctypes import Array, c_char
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from ..formats.safetensors import TensorInfo
from ..sources.protocol import SourceFile
from ..transfer.buffers import BufferPool
from ..transfer.plan import extent, make_extents
from ..transfer.protocol import Transfer, TransferEngine
from .blocks import Block, block_tensor, packed_blocks


class Filling(Protocol):
    """A block on its way into memory.

    Attributes:
        block: the block.
    """

    block: Block

    def wait(self) -> None:
        """Wait until the block is in memory.

        Raises:
            CheckpointError: its bytes could not be read.
        """
        ...

    def tensor(self, index: int) -> torch.Tensor:
        """The block's tensor number ``index``; it keeps its memory for as long as anyone holds it."""
        ...

    def cancel(self) -> None:
        """Give up."""
        ...


_F = TypeVar("_F", bound=Filling)


class Filler(Protocol[_F]):
    """One way of bringing blocks into memory.

    Attributes:
        peak_bytes: the most memory of its own that it took at once.
        blocks_ahead: how many blocks to have on their way beside the one that the consumer works on.
    """

    blocks_ahead: int

    @property
    def peak_bytes(self) -> int: ...

    def blocks(self, infos: Iterable[TensorInfo]) -> Iterator[Block]:
        """Group tensors into blocks as this way likes them."""
        ...

    def start(self, block: Block, *, force: bool) -> _F | None:
        """Begin to fill a block; None when there is no room for it now. ``force``: there must be.

        Raises:
            CheckpointError: the file is not what it was.
        """
        ...

    def passed(self, filling: _F) -> None:
        """The consumer has gone past the block after this one: whoever still holds its memory keeps it.

        Raises:
            CheckpointError: the bytes that were handed out were not the file's.
        """
        ...

    def finish(self) -> None:
        """All was handed out and passed: complete what is still under way.

        Raises:
            CheckpointError: as ``passed``.
        """
        ...


@dataclass(slots=True)
class _Reading:
    """A block that is read into a leased buffer."""

    block: Block
    memory: Array[c_char] | None
    transfer: Transfer
    number: int

    def wait(self) -> None:
        self.transfer.wait()

    def tensor(self, index: int) -> torch.Tensor:
        assert self.memory is not None
        return block_tensor(self.memory, self.block.tensors[index], self.block.positions[index])

    def cancel(self) -> None:
        self.transfer.cancel()


class PooledFiller:
    """Reads blocks into buffers that are reused."""

    # More blocks in flight do not make a page cache faster, only the processor's cache colder.
    blocks_ahead = 8

    def __init__(
        self, files: Mapping[str, SourceFile], engine: TransferEngine, *, buffer_bytes: int, block_bytes: int
    ) -> None:
        self._files = files
        self._engine = engine
        self._block_bytes = block_bytes
        self._pool = BufferPool(buffer_bytes)

    @property
    def peak_bytes(self) -> int:
        return self._pool.peak_bytes

    def blocks(self, infos: Iterable[TensorInfo]) -> Iterator[Block]:
        return packed_blocks(infos, self._block_bytes)

    def start(self, block: Block, *, force: bool) -> _Reading | None:
        lease = self._pool.lease(block.nbytes, force=force)
        if lease is None:
            return None
        numbers = {path: number for number, path in enumerate(dict.fromkeys(info.file for info in block.tensors))}
        extents = make_extents(
            [
                extent(numbers[info.file], info.offset, info.nbytes, lease.address + position)
                for info, position in zip(block.tensors, block.positions, strict=True)
            ]
        )
        files = [self._files[path] for path in numbers]
        return _Reading(block, lease.memory, self._engine.submit(files, extents, owner=lease.memory), lease.number)

    def passed(self, filling: _Reading) -> None:
        filling.memory = None
        self._pool.disown(filling.number)

    def finish(self) -> None:
        return
