"""Picks how a file is read: through the page cache where its bytes lie there already, around it where they do not.

A cold file read by O_DIRECT spares the copy into the page cache and the memory for it; a warm file read that way would
come from the disk again. (Measured, cold, ext4 on virtio: 2.8 GB/s direct with 8 threads, 1.6-2.4 GB/s buffered.)
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Literal

from ..residency import IN_MEMORY, cached_pages, file_system
from ..sources.source import SourceFile

_SAMPLES = 32
_SAMPLE_BYTES = 1 << 20
_RESIDENT = 0.95
_ABSENT = 0.05

# What is read there lies on other machines. Their clients send a large read as several requests at once.
_REMOTE = frozenset({"nfs", "lustre", "ceph", "gpfs", "beegfs"})
# File systems on which O_DIRECT reads are known to be quick. Others (FUSE, 9p, ZFS, …) take it too, but some serve it
# with one small request after the other, so there the page cache's read-ahead is the safer choice.
_DIRECT = _REMOTE | {"ext4", "xfs", "btrfs", "f2fs", "overlay"}
_MAPPED = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class ReadMode:
    """How a file is read.

    Attributes:
        name: "buffered" (through the page cache), "direct" (around it), or "mixed" (direct, but what lies in the page
            cache comes from there); or by 3FS's library ("usrbio").
        wide: whether reads wait for storage, so that more threads than CPUs are of use.
        reason: why, for the log line.
        remote: whether the file lies on other machines: large reads are divided among them by the file system.
    """

    name: Literal["buffered", "direct", "mixed", "usrbio"]
    wide: bool
    reason: str
    remote: bool = False


def choose_mode(file: SourceFile, setting: str = "auto") -> ReadMode:
    """Pick the mode for an open file.

    Args:
        file: one with a descriptor.
        setting: "buffered" or "direct" settle it; anything else lets the file system and the page cache decide.
    """
    fd = file.fileno()
    if fd is None:
        raise TypeError(f"{file.path} has no descriptor that native threads could read")
    kind = file_system(fd)
    if kind in IN_MEMORY:
        return ReadMode("buffered", False, f"{kind} lies in memory")
    share = resident_share(fd, file.size)
    warm = share is not None and share >= _RESIDENT
    if setting == "buffered":
        return ReadMode("buffered", not warm, "set")
    if setting == "direct":
        return ReadMode("direct", True, "set", kind in _REMOTE)
    return _choose(kind, share)


def by_page_cache(mode: ReadMode) -> ReadMode:
    """What becomes of a mode where several processes of this machine read the same bytes, each for itself.

    The first one of them to read brings the bytes into the page cache, and the others have them from there.
    """
    if mode.name not in ("direct", "mixed"):
        return mode
    return ReadMode("buffered", True, f"{mode.reason}; other ranks read it too", mode.remote)


def can_map(file: SourceFile, *, always: bool = False) -> bool:
    """Whether to hand out mapped pages of a file: they lie in memory already, and a copy would be one pass too many.

    Args:
        file: any open file.
        always: also when it does not lie in the page cache.
    """
    fd = file.fileno()
    if fd is None or file.size == 0 or not file.mappable:
        return False
    if always or file_system(fd) in _MAPPED:
        return True
    share = resident_share(fd, file.size)
    return share is not None and share >= _RESIDENT


def _choose(kind: str, share: float | None) -> ReadMode:
    if share is None:
        return ReadMode("buffered", True, f"{kind}; the kernel does not say what is cached")
    where = f"{kind}, {share:.0%} in the page cache"
    if share >= _RESIDENT:
        return ReadMode("buffered", False, where)
    if kind not in _DIRECT:
        return ReadMode("buffered", True, where)
    return ReadMode("direct" if share <= _ABSENT else "mixed", True, where, kind in _REMOTE)


def resident_share(fd: int, size: int) -> float | None:
    """The share (0 to 1) of a file that lies in the page cache, by samples; None where the kernel does not say."""
    if size == 0:
        return 1.0
    pages = cached = 0
    for offset, length in _samples(size):
        found = cached_pages(fd, offset, length)
        if found is None:
            return None
        cached += found
        pages += -(-length // mmap.PAGESIZE)
    return cached / pages


def _samples(size: int) -> list[tuple[int, int]]:
    """Where to look: evenly over the file, from page boundaries on, all of it when it is small."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return [(0, size)]
    step = (size - _SAMPLE_BYTES) / (_SAMPLES - 1)
    unit = mmap.ALLOCATIONGRANULARITY
    return [(int(step * number) // unit * unit, _SAMPLE_BYTES) for number in range(_SAMPLES)]
