"""Decides which items of a plan go into which data file of a DCP checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch.distributed.checkpoint.planner import WriteItem, WriteItemType


def file_contents(items: Sequence[WriteItem], *, files: int | None, safetensors: bool) -> Iterator[list[WriteItem]]:
    """The items of each data file. No file is empty, because the metadata names a file only with its items.

    Args:
        items: the items of a rank's plan.
        files: how many files the rank writes; None: one file per item.
        safetensors: True if tensors are written as safetensors files. Then a file holds either tensors whose names
            differ, or items that are not tensors, and there can be more files.
    """
    buckets = [[item] for item in items] if files is None else _by_size(files, items)
    for bucket in filter(None, buckets):
        yield from _for_safetensors(bucket) if safetensors else [bucket]


def is_tensor(item: WriteItem) -> bool:
    """False for an item of pickled bytes."""
    return item.type != WriteItemType.BYTE_IO


def tensor_nbytes(item: WriteItem) -> int:
    """The bytes of the chunk of a tensor that a tensor's item writes."""
    data = item.tensor_data
    assert data is not None
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize


def _by_size(count: int, items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Items that are not tensors go to the buckets in turn; each tensor, largest first, to the bucket with the fewest
    bytes."""
    if count == 1:
        return [list(items)]
    buckets: list[list[WriteItem]] = [[] for _ in range(count)]
    for number, item in enumerate(item for item in items if not is_tensor(item)):
        buckets[number % count].append(item)
    sizes = [0] * count
    for item in sorted(filter(is_tensor, items), key=tensor_nbytes, reverse=True):
        least = sizes.index(min(sizes))
        buckets[least].append(item)
        sizes[least] += tensor_nbytes(item)
    return buckets


def _for_safetensors(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    """Split the items of a file into those of files of tensors with different names, and of a file without tensors."""
    others = [item for item in items if not is_tensor(item)]
    if others:
        yield others
    times: defaultdict[str, int] = defaultdict(int)
    files: defaultdict[int, list[WriteItem]] = defaultdict(list)
    for item in filter(is_tensor, items):
        files[times[item.index.fqn]].append(item)
        times[item.index.fqn] += 1
    yield from files.values()
