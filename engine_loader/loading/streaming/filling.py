"""How the memory of a block is filled: by reading into pooled buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from ctypes import Array, c_char
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from ...formats.safetensors import TensorInfo
from ...sources.source import SourceFile
from ...transfer.device_stream import DeviceStream
from ...transfer.memory.buffers import BufferPool
from ...transfer.native.native_readers import NativeReaders
from ...transfer.plan import Extents, extent, make_extents
from ...transfer.protocol import ReaderThreads, Transfer
from .blocks import Block, block_tensor, device_blocks, packed_blocks, shaped


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
        self, files: Mapping[str, SourceFile], readers: ReaderThreads, *, buffer_bytes: int, block_bytes: int
    ) -> None:
        self._files = files
        self._readers = readers
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
        files, extents = _plan(self._files, block, lease.address)
        return _Reading(block, lease.memory, self._readers.submit(files, extents, owner=lease.memory), lease.number)

    def passed(self, filling: _Reading) -> None:
        filling.memory = None
        self._pool.disown(filling.number)

    def finish(self) -> None:
        return


@dataclass(slots=True)
class _Placing:
    """A block that is put into the memory of a device."""

    block: Block
    memory: torch.Tensor | None
    transfer: Transfer

    def wait(self) -> None:
        self.transfer.wait()

    def tensor(self, index: int) -> torch.Tensor:
        assert self.memory is not None
        info, position = self.block.tensors[index], self.block.positions[index]
        return shaped(self.memory.narrow(0, position, info.nbytes), info, position)

    def cancel(self) -> None:
        self.transfer.cancel()

    def release(self) -> None:
        self.memory = None


class Releasable(Filling, Protocol):
    """A block in memory of its own."""

    def release(self) -> None:
        """Let go of the memory."""
        ...


FillingT = TypeVar("FillingT", bound=Releasable)


class FreshMemoryFiller(Generic[FillingT]):
    """Brings blocks into memory that is made for each of them, within a budget.

    The budget covers the blocks that are being filled, or were just handed out. What the consumer keeps is its own.

    Args:
        buffer_bytes: the budget.
    """

    blocks_ahead = 64

    def __init__(self, buffer_bytes: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._used_bytes = 0
        self.peak_bytes = 0

    def start(self, block: Block, *, force: bool) -> FillingT | None:
        if self._used_bytes + block.nbytes > self._buffer_bytes and not force:
            return None
        filling = self._begin(block)
        self._used_bytes += block.nbytes
        self.peak_bytes = max(self.peak_bytes, self._used_bytes)
        return filling

    def passed(self, filling: FillingT) -> None:
        filling.release()
        self._used_bytes -= filling.block.nbytes

    def finish(self) -> None:
        return

    def _begin(self, block: Block) -> FillingT:
        """Make memory for a block, and begin to fill it."""
        raise NotImplementedError


class DeviceFiller(FreshMemoryFiller[_Placing]):
    """Reads blocks into memory of a device that is made for each of them; the allocator sees to its reuse.

    Args:
        files: by path.
        readers: reads.
        current: the device, and the stream that is the current one now.
        empty: so many fresh bytes there.
        buffer_bytes: the budget.
        block_bytes: of a block, at most.
    """

    def __init__(
        self,
        files: Mapping[str, SourceFile],
        readers: NativeReaders,
        *,
        current: Callable[[], DeviceStream],
        empty: Callable[[int], torch.Tensor],
        buffer_bytes: int,
        block_bytes: int,
    ) -> None:
        super().__init__(buffer_bytes)
        self._files = files
        self._readers = readers
        self._current = current
        self._empty = empty
        self._block_bytes = block_bytes

    def blocks(self, infos: Iterable[TensorInfo]) -> Iterator[Block]:
        return device_blocks(infos, self._block_bytes)

    def _begin(self, block: Block) -> _Placing:
        memory = self._empty(block.nbytes)
        files, extents = _plan(self._files, block, memory.data_ptr())
        return _Placing(block, memory, self._readers.submit_to_device(files, extents, self._current(), owner=memory))


def _plan(files: Mapping[str, SourceFile], block: Block, address: int) -> tuple[list[SourceFile], Extents]:
    """The block's files, and the extents that put it at ``address``."""
    numbers = {path: number for number, path in enumerate(dict.fromkeys(info.file for info in block.tensors))}
    rows = [
        extent(numbers[info.file], info.offset, info.nbytes, address + position)
        for info, position in zip(block.tensors, block.positions, strict=True)
    ]
    return [files[path] for path in numbers], make_extents(rows)
