"""Blocks as mapped pages of a file that lies in the page cache: a read into a buffer and a copy out of it would be one
pass too many.

The consumer's copy is then the only pass there is; it takes the page faults, which is cheaper than making the pages
present beforehand on threads that compete with the copy (measured: 1.6 GB on two cores, 0.09 s of populating against
0.03 s of faults).

A tensor that the consumer still holds when it has gone on (asked for the one after the next four) is detached from the
file: memory of this process takes the place of its pages, at the same address. Until then a file that is cut short
trips a guard, and is reported as an error (both: transfer/native/src/memory/guard.h).
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from ctypes import Array, c_char
from dataclasses import dataclass

import torch

from ...failures import end_of_file
from ...formats.safetensors import TensorInfo
from ...sources.source import SourceFile
from ...transfer.memory.guard import Guard, detach
from .blocks import Block, block_tensor, file_blocks

# Large, since mapping costs nothing and the kernel can use huge pages inside; bounded, since what the consumer writes
# into its tensors (copies of pages then) goes with the mapping.
_MOST_MAPPED_BYTES = 256 << 20
# So many tensors before the one that is asked for may be held without being kept: by the variables of loops, one within
# the other. (vLLM's grouping of names holds the last two of a layer; to copy those was a quarter of all bytes.)
_HELD_BY_LOOPS = 4
# A consumer that keeps this share of what it is given is better served by reading into memory of its own at once.
_KEEPING_SHARE = 0.5
_KEEPING_GRACE_BYTES = 64 << 20


@dataclass(slots=True)
class _Keeping:
    """What the consumer has done with the tensors it was given."""

    given_bytes: int = 0
    kept_bytes: int = 0

    def count(self, nbytes: int, *, kept: bool) -> None:
        self.given_bytes += nbytes
        self.kept_bytes += nbytes if kept else 0

    @property
    def most(self) -> bool:
        """Whether it has kept most of them."""
        return self.kept_bytes > max(_KEEPING_GRACE_BYTES, _KEEPING_SHARE * self.given_bytes)


class _Recent:
    """The tensors handed out last, in order, each with an exporter of its own: so it is seen which are held."""

    def __init__(self, keeping: _Keeping) -> None:
        self._keeping = keeping
        self._tensors: deque[tuple[weakref.ref[Array[c_char]], int, _Mapping]] = deque()

    def add(self, memory: Array[c_char], mapping: _Mapping) -> None:
        """Take note of one more."""
        self._tensors.append((weakref.ref(memory), len(memory), mapping))

    def detach_kept(self, *, beside: int) -> None:
        """Detach those that are held, beside the last ones.

        Raises:
            CheckpointError: the bytes that were handed out were not the file's.
        """
        while len(self._tensors) > beside:
            exporter, nbytes, mapping = self._tensors.popleft()
            memory = exporter()
            self._keeping.count(nbytes, kept=memory is not None)
            if memory is not None:
                detach(ctypes.addressof(memory), nbytes)
                mapping.check()


@dataclass(slots=True)
class _Mapping:
    """A part of a file in memory; the tensors made of it keep it alive."""

    block: Block
    file: SourceFile
    pages: mmap.mmap | None
    guard: Guard
    keeping: _Keeping
    recent: _Recent

    def wait(self) -> None:
        """There is nothing to wait for: the pages come when they are touched."""

    def cancel(self) -> None:
        """Nor anything to cancel."""

    def tensor(self, index: int) -> torch.Tensor:
        info, position = self.block.tensors[index], self.block.positions[index]
        assert self.pages is not None
        if not info.nbytes:
            return block_tensor((c_char * 0)(), info, 0)
        self.recent.detach_kept(beside=_HELD_BY_LOOPS)
        memory = (c_char * info.nbytes).from_buffer(self.pages, position)
        tensor = block_tensor(memory, info, 0)
        if self.keeping.most:
            # Cloned at once: detaching each would give the process a mapping of its own for every tensor.
            self.keeping.count(info.nbytes, kept=True)
            return tensor.clone()
        self.recent.add(memory, self)
        return tensor

    def passed(self) -> None:
        # The tensors alone hold the pages from here on.
        self.pages = None
        self.check()

    def check(self) -> None:
        """Raise CheckpointError when the file was cut short under the pages."""
        if self.guard.tripped:
            self.file.verify_unchanged()
            raise end_of_file(self.file.path, self.file.size, self.file.size)


class MappedFiller:
    """Maps blocks privately (copy on write: what the consumer writes never reaches the file)."""

    # Pages of the page cache, not memory of ours.
    peak_bytes = 0
    blocks_ahead = 1

    def __init__(self, files: Mapping[str, SourceFile], *, buffer_bytes: int, count: Callable[[int], object]) -> None:
        self._files = files
        self._mapping_bytes = min(_MOST_MAPPED_BYTES, buffer_bytes // 2)
        self._count = count
        self._keeping = _Keeping()
        self._recent = _Recent(self._keeping)

    @property
    def consumer_keeps(self) -> bool:
        """Whether the consumer has turned out to keep most of what it is given."""
        return self._keeping.most

    def blocks(self, infos: Iterable[TensorInfo]) -> Iterator[Block]:
        return file_blocks(infos, self._mapping_bytes)

    def start(self, block: Block, *, force: bool) -> _Mapping:
        first = block.tensors[0]
        file = self._files[first.file]
        fd = file.fileno()
        begin = first.offset - block.positions[0]
        assert fd is not None
        try:
            pages = mmap.mmap(
                fd, max(block.nbytes, 1), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=begin
            )
        except ValueError:
            # Python refuses to map beyond the end of a file.
            raise end_of_file(file.path, begin, file.size) from None
        guard = Guard(ctypes.addressof(c_char.from_buffer(pages)), len(pages))
        # Called before the pages are unmapped: from then on their addresses are nobody's business.
        weakref.finalize(pages, guard.remove).atexit = False
        self._count(block.nbytes - block.positions[0])
        return _Mapping(block, file, pages, guard, self._keeping, self._recent)

    def passed(self, filling: _Mapping) -> None:
        filling.passed()

    def finish(self) -> None:
        self._recent.detach_kept(beside=0)
