"""Items of a training checkpoint: where in a file the elements of each stored tensor lie."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch

from ...errors import CheckpointError
from ...formats.dtypes import DTYPE_BITS, torch_dtype
from ...formats.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, parse_header
from ...formats.torch_item import ENDS_BYTES, item_layout
from ...garbage import no_garbage_collection
from ...sources.source import SourceFile
from ...transfer.plan import ExtentRow, extent
from ...transfer.protocol import Transfer, wait_or_cancel
from ..geometry import contiguous_strides
from .boxes import Piece, Pieces, StoredTensor
from .files import COPY_AGAIN, DcpFiles

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

_T = TypeVar("_T")
_Contents: TypeAlias = Mapping[str, TensorInfo]
_Key: TypeAlias = tuple[int, int, str]
"""Of an item: the number of its file, its offset there, the tensor's name."""
_FIRST_ITEMS, _ITEMS_AT_ONCE = 16, 4096
_FIRST_READ_BYTES = 32 << 10
"""Of a file: mostly all of its header, where it has one."""
_LEAST_END, _MOST_END = LENGTH_BYTES + 2, LENGTH_BYTES + MAX_HEADER_BYTES


class PartInfo(NamedTuple):
    """Where a part of a tensor is stored, of a file whose header is known.

    It has the fields of DCP's ``_StorageInfo`` and of its ``_HFStorageInfo``.
    """

    relative_path: str
    offset: int
    length: int
    shape: torch.Size
    dtype: torch.dtype
    transform_descriptors: None = None


class JoinedParts(NamedTuple):
    """Where a whole tensor is stored whose parts are its rows, in order. It has the fields of PartInfo.

    Attributes:
        relative_path, offset: of the first part.
        length, shape, dtype: of the whole.
        parts: each that is not empty, with the number of its first row.
    """

    relative_path: str
    offset: int
    length: int
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[tuple[int, PartInfo], ...]
    transform_descriptors: None = None


@dataclass(frozen=True, slots=True)
class _Ends:
    """The first and last bytes of items of ``torch.save``, on their way."""

    items: list[tuple[_Key, _StorageInfo]]
    content: torch.Tensor
    transfer: Transfer

    def stored(self) -> Iterator[tuple[_Key, StoredTensor | None]]:
        """What they tell of each item, when they have come."""
        wait_or_cancel(self.transfer)
        content = self.content.numpy().data.cast("B")
        for head, (key, info) in zip(range(0, len(content), 2 * ENDS_BYTES), self.items, strict=True):
            size = min(info.length, ENDS_BYTES)
            tail = head + ENDS_BYTES
            layout = item_layout(bytes(content[head : head + size]), bytes(content[tail : tail + size]), info.length)
            dtype = None if layout is None else getattr(torch, layout.dtype, None)
            if layout is None or dtype is None:
                yield key, None
                continue
            number, offset, name = key
            yield key, StoredTensor(name, number, offset + layout.offset, dtype, layout.shape, layout.strides)


class Items:
    """Finds out where in their files the elements of stored tensors lie, and remembers it.

    May be used from several threads.

    Args:
        files: the checkpoint's files.
    """

    def __init__(self, files: DcpFiles) -> None:
        self._files = files
        self._headers: dict[int, _Contents | None] = {}
        self._stored: dict[_Key, StoredTensor | None] = {}

    def locate(self, items: Sequence[tuple[str, _StorageInfo]]) -> list[StoredTensor | None]:
        """Where the elements of tensors lie; None where only ``torch.load`` of the item can tell.

        Args:
            items: (name, where it is stored) of each.

        Raises:
            CheckpointError: an item does not lie within its file, or its file does not have it.
        """
        return list(self.locating(items))

    def locating(self, items: Sequence[tuple[str, _StorageInfo]]) -> Iterator[StoredTensor | None]:
        """Like ``locate``, one by one: the first can be read while the next are looked at.

        What has to be read for that is asked for before the first is yielded, of up to 4,096 items.
        """
        if all(isinstance(info, PartInfo | JoinedParts) for _, info in items):
            # Nothing has to be read: each is looked at when it is asked for.
            yield from (self._known(name, info) for name, info in items)
            return
        # All are checked before anything is read.
        located = [(*self._files.item(info, name), name, info) for name, info in items]
        known = self._stored
        keys: list[_Key] = []
        zips: dict[_Key, _StorageInfo] = {}
        for number, file, name, info in located:
            key = (number, info.offset, name)
            keys.append(key)
            if key in known:
                continue
            header = self._header(number, file)
            if info.transform_descriptors:
                known[key] = None
            elif header is not None:
                known[key] = _in_safetensors(header, number, file.path, name, info)
            else:
                zips[key] = info
        found = self._in_zips(zips)
        for key in keys:
            while key not in known:
                read, stored = next(found)
                known[read] = stored
            yield known[key]

    def _known(self, name: str, stored: Any) -> StoredTensor:
        """A part whose place the headers told, or several that are the rows of one tensor."""
        if not isinstance(stored, JoinedParts):
            return _in_part(name, self._files.item(stored, name)[0], stored)
        pitch = stored.length // stored.shape[0]
        pieces = []
        parts: Sequence[tuple[int, Any]] = stored.parts
        for row, part in parts:
            number, _ = self._files.item(part, name)
            pieces.append(Piece(number, part.offset, row, row + part.shape[0], 0, pitch))
        whole = PartInfo("", 0, stored.length, stored.shape, stored.dtype)
        return _in_part(name, pieces[0].file, whole)._replace(pieces=Pieces(pitch, tuple(pieces)))

    def _header(self, number: int, file: SourceFile) -> _Contents | None:
        """The tensors of a safetensors file by name; None for any other."""
        if number not in self._headers:
            self._headers[number] = self._read_header(number, file)
        return self._headers[number]

    def _read_header(self, number: int, file: SourceFile) -> _Contents | None:
        if file.size <= LENGTH_BYTES:
            return None
        first = self._files.read_bytes(number, 0, min(file.size, _FIRST_READ_BYTES))
        end = LENGTH_BYTES + int.from_bytes(first[:LENGTH_BYTES], "little")
        # No zip, and hardly another pickle, begins like this.
        if first[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{" or not _LEAST_END <= end <= min(_MOST_END, file.size):
            return None
        if end > len(first):
            first += self._files.read_bytes(number, len(first), end - len(first))
        with no_garbage_collection():
            header = parse_header(first[LENGTH_BYTES:end], file.size, file.path)
            return {tensor.name: tensor for tensor in header.tensors}

    def _in_zips(self, items: Mapping[_Key, _StorageInfo]) -> Iterator[tuple[_Key, StoredTensor | None]]:
        """Where the elements of items of torch.save lie, in order, by both ends of each, which are read many at once.

        A few come first: what their ends tell is used while those of the others are read.
        """
        flying: deque[_Ends] = deque()
        for batch in _batched(items.items(), _FIRST_ITEMS, _ITEMS_AT_ONCE):
            flying.append(self._read_ends(batch))
            if len(flying) > 1:
                yield from flying.popleft().stored()
        while flying:
            yield from flying.popleft().stored()

    def _read_ends(self, items: list[tuple[_Key, _StorageInfo]]) -> _Ends:
        content = torch.empty((len(items), 2, ENDS_BYTES), dtype=torch.uint8)
        rows: list[ExtentRow] = []
        address = content.data_ptr()
        for (number, offset, _), info in items:
            size = min(info.length, ENDS_BYTES)
            rows.append(extent(number, offset, size, address))
            rows.append(extent(number, offset + info.length - size, size, address + ENDS_BYTES))
            address += 2 * ENDS_BYTES
        return _Ends(items, content, self._files.submit_extents(rows, content))


@cache
def _dtype_names() -> dict[torch.dtype, str]:
    names: dict[torch.dtype, str] = {}
    for name in DTYPE_BITS:
        with suppress(CheckpointError):  # this torch does not have it
            names.setdefault(torch_dtype(name), name)
    names[torch.uint8] = "U8"  # 6-bit types come as these bytes
    return names


def dtype_name(dtype: torch.dtype) -> str | None:
    """The safetensors name of an element type; None where it has none."""
    return _dtype_names().get(dtype)


def _in_part(name: str, number: int, part: PartInfo) -> StoredTensor:
    shape = tuple(part.shape)
    return StoredTensor(name, number, part.offset, part.dtype, shape, tuple(contiguous_strides(shape)))


def _in_safetensors(contents: _Contents, number: int, file: str, name: str, info: _StorageInfo) -> StoredTensor:
    tensor = contents.get(name)
    if tensor is None:
        raise CheckpointError(
            f"the metadata puts {name!r} into this file, which does not have it", file=file, hint=COPY_AGAIN
        )
    # torch 2.13 itself writes the offset 0 for all of them, but each name only once into a file.
    if info.offset not in (0, tensor.offset) or info.length != tensor.nbytes:
        raise CheckpointError(
            f"{name!r} is {info.length} bytes at {info.offset} by the metadata, "
            f"but {tensor.nbytes} at {tensor.offset} by the file's header",
            file=tensor.file,
            hint=COPY_AGAIN,
        )
    _, shape = tensor.as_torch()
    return StoredTensor(name, number, tensor.offset, torch_dtype(tensor.dtype), shape, tuple(contiguous_strides(shape)))


def _batched(items: Iterable[_T], first: int, size: int) -> Iterator[list[_T]]:
    left = iter(items)
    while batch := list(itertools.islice(left, first)):
        yield batch
        first = size
