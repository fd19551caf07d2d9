"""The files of a DCP checkpoint: where in them the elements of each stored tensor lie, and reads of any part of it."""

from __future__ import annotations

import io
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias, TypeVar

import numpy as np
import torch

from ...errors import CheckpointError
from ...formats.dcp_metadata import MAX_METADATA_BYTES, METADATA_NAME, parse_metadata
from ...formats.dtypes import DTYPE_BITS, torch_dtype
from ...formats.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, parse_header
from ...formats.torch_item import ENDS_BYTES, item_layout
from ...garbage import no_garbage_collection
from ...report.load import LoadReport
from ...settings import LoaderSettings
from ...sources.source import Source, SourceFile
from ...transfer.constructor import make_readers_for
from ...transfer.device_stream import DeviceStream
from ...transfer.plan import ExtentRow, extent, make_extents
from ...transfer.protocol import ReaderThreads, Transfer, wait_or_cancel
from ..geometry import contiguous_strides, view_extents
from ..safetensors_store import complete_report, submit_to
from ..targets import overlaps_itself

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata

_T = TypeVar("_T")
_Contents: TypeAlias = Mapping[str, TensorInfo]
_Key: TypeAlias = tuple[int, int, str]
"""Of an item: the number of its file, its offset there, the tensor's name."""
_COPY_AGAIN = "a file was cut short or belongs to another save: copy the checkpoint again"
_MANY_RUNS = 4096
"""So many runs of a few bytes each are read as what they span, and taken apart by torch."""
_SHORT_RUN_BYTES = 64
_MOST_SPAN_BYTES = 64 << 20
_MOST_SPAN_FACTOR = 16
_FIRST_ITEMS, _ITEMS_AT_ONCE = 16, 4096
_FEW_FILES = 16
"""So many are passed to the reader threads without finding out which of them a plan needs."""
_FIRST_READ_BYTES = 32 << 10
"""Of a file: mostly all of its header, where it has one."""
_LEAST_END, _MOST_END = LENGTH_BYTES + 2, LENGTH_BYTES + MAX_HEADER_BYTES


class StoredTensor(NamedTuple):
    """A tensor, or a chunk of one, as it is stored.

    Attributes:
        name: in the checkpoint.
        file: its number in ``DcpFiles``.
        offset: of its first element in the file, in bytes.
        dtype, shape, strides: of what is stored; strides in elements.
    """

    name: str
    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class Part:
    """The read of one part of a stored tensor.

    Attributes:
        extents: what to read.
        owner: what keeps the memory it goes to.
        pending: where the bytes do not go to their target straight away: (what is read, the target).
        nbytes: of the part.
    """

    extents: list[ExtentRow]
    owner: torch.Tensor
    pending: tuple[torch.Tensor, torch.Tensor] | None
    nbytes: int

    def finish(self) -> None:
        """To be called when the extents have been read."""
        if self.pending is not None:
            read, target = self.pending
            with torch.no_grad():
                target.copy_(read)


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


class DcpFiles:
    """The data files of a checkpoint, opened when they are needed, and the reader threads.

    May be used from several threads.

    Args:
        source: where they are.
        directory: the checkpoint's.
        settings: how to read.
    """

    def __init__(self, source: Source, directory: str, settings: LoaderSettings) -> None:
        self.source = source
        self.directory = directory
        self._settings = settings
        self._files: list[SourceFile] = []
        self._numbers: dict[str, int] = {}
        self._headers: dict[int, _Contents | None] = {}
        self._stored: dict[_Key, StoredTensor | None] = {}
        self._readers: ReaderThreads | None = None
        self._lock = threading.RLock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def metadata_path(self) -> str:
        """The path of ``.metadata``, for messages."""
        return os.path.join(self.directory, METADATA_NAME)

    def path_of(self, number: int) -> str:
        """The path of a file by its number."""
        return self._files[number].path

    def read_metadata(self, name: str = METADATA_NAME) -> Metadata:
        """Read and check ``.metadata``.

        Raises:
            CheckpointError: it is missing, unreadable or wrong; nothing that it names was run.
        """
        number, file = self._open(name)
        if file.size > MAX_METADATA_BYTES:
            raise CheckpointError(f"the metadata has {file.size} bytes, more than are read", file=file.path)
        return parse_metadata(self._bytes(number, 0, file.size), file.path)

    def item(self, info: _StorageInfo, name: str) -> tuple[int, SourceFile]:
        """The number and the file of an item, opened, its bounds checked.

        Raises:
            CheckpointError: the file is missing, or the item does not lie within it.
        """
        number, file = self._open(info.relative_path)
        if info.offset + info.length > file.size:
            raise CheckpointError(
                f"{name!r} is {info.length} bytes here, but the file ends after {file.size}",
                file=file.path,
                offset=info.offset,
                hint=_COPY_AGAIN,
            )
        return number, file

    def read_item(self, info: _StorageInfo, name: str) -> bytes:
        """All bytes of an item.

        Raises:
            CheckpointError: they cannot be read.
        """
        number, _ = self.item(info, name)
        return self._bytes(number, info.offset, info.length)

    def locate(self, items: Sequence[tuple[str, _StorageInfo]]) -> list[StoredTensor | None]:
        """Where the elements of tensors lie; None where only ``torch.load`` of the item can tell.

        Args:
            items: (name, place) of each.

        Raises:
            CheckpointError: an item does not lie within its file, or its file does not have it.
        """
        return list(self.locating(items))

    def locating(self, items: Sequence[tuple[str, _StorageInfo]]) -> Iterator[StoredTensor | None]:
        """The same one by one, so that the first can be read while the next are looked at.

        What has to be read for that is asked for before the first is yielded, of up to 4,096 items.
        """
        # All are checked before anything is read.
        places = [(*self.item(info, name), name, info) for name, info in items]
        known = self._stored
        keys: list[_Key] = []
        zips: dict[_Key, _StorageInfo] = {}
        for number, file, name, info in places:
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

    def part(self, stored: StoredTensor, offsets: Sequence[int], lengths: Sequence[int], target: torch.Tensor) -> Part:
        """The read of a part of a stored tensor into ``target``, which it fills.

        Args:
            stored: the tensor.
            offsets: of the part in it, in elements per dimension.
            lengths: of the part.
            target: of the same shape; of any device and element type.

        Raises:
            CheckpointError: the part is not within the tensor, or the target has another shape.
        """
        plain = _is_plain(target, stored.dtype)
        if plain and _is_one_run(stored, offsets, lengths, target):
            nbytes = target.nbytes
            first = stored.offset + offsets[0] * stored.strides[0] * stored.dtype.itemsize
            return Part([extent(stored.file, first, nbytes, target.data_ptr())], target, None, nbytes)
        whole = stored.shape
        inside = len(offsets) == len(lengths) == len(whole) and all(
            begin >= 0 and length >= 0 and begin + length <= size
            for begin, length, size in zip(offsets, lengths, whole, strict=True)
        )
        if not inside or tuple(target.shape) != tuple(lengths):
            raise CheckpointError(
                f"{stored.name!r}: the part {list(lengths)} at {list(offsets)} of what is stored as {list(whole)} "
                f"is to go to {list(target.shape)}",
                file=self.path_of(stored.file),
                hint="metadata and files are of different saves, or a shape differs between model and checkpoint",
            )
        first = stored.offset + _dot(offsets, stored.strides) * stored.dtype.itemsize
        nbytes = math.prod(lengths) * stored.dtype.itemsize
        if not nbytes:
            return Part([], target, None, 0)
        if plain and not _scattered(lengths, stored, target.stride()):
            return Part(_extents(stored, first, lengths, target), target, None, nbytes)
        span = _dot([length - 1 for length in lengths], stored.strides) + 1
        costly = span * stored.dtype.itemsize > max(_MOST_SPAN_BYTES, _MOST_SPAN_FACTOR * nbytes)
        if costly or not _scattered(lengths, stored, contiguous_strides(lengths)):
            read = torch.empty(tuple(lengths), dtype=stored.dtype, device="cpu")
            return Part(_extents(stored, first, lengths, read), read, (read, target), nbytes)
        flat = torch.empty(span, dtype=stored.dtype, device="cpu")
        rows = [extent(stored.file, first, flat.nbytes, flat.data_ptr())]
        return Part(rows, flat, (flat.as_strided(tuple(lengths), stored.strides), target), flat.nbytes)

    def submit(self, parts: Sequence[Part]) -> Transfer | None:
        """Start reading parts; None where there is nothing to read. Call ``finish`` of each when it is done.

        Raises:
            CheckpointError: an extent reaches beyond its file; other errors come when the transfer is waited for.
        """
        extents = [row for part in parts for row in part.extents]
        if not extents:
            return None
        return self.submit_extents(extents, [part.owner for part in parts])

    def read(self, parts: Sequence[Part]) -> None:
        """Read parts and wait for them.

        Raises:
            CheckpointError: the bytes could not be read; the targets then hold unspecified bytes.
        """
        transfer = self.submit(parts)
        if transfer is not None:
            wait_or_cancel(transfer)
        for part in parts:
            part.finish()

    def verify_unchanged(self) -> None:
        """Raise CheckpointError when a file is shorter than it was."""
        for file in list(self._files):
            file.verify_unchanged()

    def finish(self, report: LoadReport) -> None:
        """Check that no file changed meanwhile, and complete the account.

        Raises:
            CheckpointError: a file is shorter than it was.
        """
        self.verify_unchanged()
        report.count_files(file.path for file in self._files if file.path != self.metadata_path)
        complete_report(report, self.source.name, self.running_readers())

    def close(self) -> None:
        """Cancel what is in flight; give back files and threads. Safe to call twice."""
        with self._lock:
            self._closed = True
            readers, self._readers = self._readers, None
            files, self._files = self._files, []
        if readers is not None:
            readers.close()
        for file in files:
            file.close()

    def _open(self, relative_path: str) -> tuple[int, SourceFile]:
        with self._lock:
            if self._closed:
                raise CheckpointError("the checkpoint is closed", file=self.directory)
            number = self._numbers.get(relative_path)
            if number is None:
                self._files.append(self.source.open(os.path.join(self.directory, relative_path)))
                number = self._numbers[relative_path] = len(self._files) - 1
            return number, self._files[number]

    def _bytes(self, number: int, offset: int, nbytes: int) -> bytes:
        content = torch.empty(nbytes, dtype=torch.uint8)
        rows = [extent(number, offset, nbytes, content.data_ptr())]
        wait_or_cancel(self.submit_extents(rows, content))
        return content.numpy().tobytes()

    def _header(self, number: int, file: SourceFile) -> _Contents | None:
        """The tensors of a safetensors file by name; None for any other."""
        if number not in self._headers:
            self._headers[number] = self._read_header(number, file)
        return self._headers[number]

    def _read_header(self, number: int, file: SourceFile) -> _Contents | None:
        if file.size <= LENGTH_BYTES:
            return None
        first = self._bytes(number, 0, min(file.size, _FIRST_READ_BYTES))
        end = LENGTH_BYTES + int.from_bytes(first[:LENGTH_BYTES], "little")
        # No zip, and hardly another pickle, begins like this.
        if first[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{" or not _LEAST_END <= end <= min(_MOST_END, file.size):
            return None
        if end > len(first):
            first += self._bytes(number, len(first), end - len(first))
        with no_garbage_collection():
            header = parse_header(first[LENGTH_BYTES:end], file.size, file.path)
            return {tensor.name: tensor for tensor in header.tensors}

    def _in_zips(self, items: Mapping[_Key, _StorageInfo]) -> Iterator[tuple[_Key, StoredTensor | None]]:
        """What lies where in items of torch.save, in their order, by both their ends, which are read many at once.

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
        place = content.data_ptr()
        for (number, offset, _), info in items:
            size = min(info.length, ENDS_BYTES)
            rows.append(extent(number, offset, size, place))
            rows.append(extent(number, offset + info.length - size, size, place + ENDS_BYTES))
            place += 2 * ENDS_BYTES
        return _Ends(items, content, self.submit_extents(rows, content))

    def submit_extents(self, rows: Sequence[ExtentRow], owner: object, place: DeviceStream | None = None) -> Transfer:
        """Start a plan; of a checkpoint's many files, only those that it needs are passed to the reader threads."""
        extents, files = make_extents(rows), list(self._files)
        if len(files) > _FEW_FILES:
            numbers, extents["file"] = np.unique(extents["file"], return_inverse=True)
            files = [files[number] for number in numbers]
        return submit_to(place, self.running_readers(), files, extents, owner)

    def running_readers(self) -> ReaderThreads:
        """The reader threads, which begin with the first read."""
        with self._lock:
            if self._closed:
                raise CheckpointError("the checkpoint is closed", file=self.directory)
            if self._readers is None:
                self._readers = make_readers_for(self._files, self._settings)
            return self._readers


def load_item(content: bytes, name: str, file: str, offset: int) -> torch.Tensor:
    """The tensor of a stored item by ``torch.load``, which runs nothing (``weights_only``).

    Raises:
        CheckpointError: it is none.
    """
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Of damaged bytes, torch.load raises what it comes across.
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the item of {name!r} cannot be read as a tensor: {text}", file=file, offset=offset, hint=_COPY_AGAIN
        ) from error
    if not isinstance(loaded, torch.Tensor):
        raise CheckpointError(
            f"the item of {name!r} is a {type(loaded).__name__}, not a tensor", file=file, offset=offset
        )
    return loaded


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


def _in_safetensors(contents: _Contents, number: int, file: str, name: str, info: _StorageInfo) -> StoredTensor:
    tensor = contents.get(name)
    if tensor is None:
        raise CheckpointError(
            f"the metadata puts {name!r} into this file, which does not have it", file=file, hint=_COPY_AGAIN
        )
    # torch 2.13 itself writes the offset 0 for all of them, but each name only once into a file.
    if info.offset not in (0, tensor.offset) or info.length != tensor.nbytes:
        raise CheckpointError(
            f"{name!r} is {info.length} bytes at {info.offset} by the metadata, "
            f"but {tensor.nbytes} at {tensor.offset} by the file's header",
            file=tensor.file,
            hint=_COPY_AGAIN,
        )
    _, shape = tensor.as_torch()
    return StoredTensor(name, number, tensor.offset, torch_dtype(tensor.dtype), shape, tuple(contiguous_strides(shape)))


def _batched(items: Iterable[_T], first: int, size: int) -> Iterator[list[_T]]:
    left = iter(items)
    while batch := list(itertools.islice(left, first)):
        yield batch
        first = size


def _is_plain(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of the file can be put where the target's memory is."""
    if type(target) not in (torch.Tensor, torch.nn.Parameter) or target.layout != torch.strided:
        return False
    if target.dtype != dtype or target.device.type != "cpu" or target.is_conj() or target.is_neg():
        return False
    try:
        return target.data_ptr() != 0 and (target.is_contiguous() or not overlaps_itself(target))
    except RuntimeError:  # fake tensors have no address
        return False


def _is_one_run(stored: StoredTensor, offsets: Sequence[int], lengths: Sequence[int], target: torch.Tensor) -> bool:
    """Whether a part is within its tensor, and as contiguous there as in its plain target: all of it, or whole rows."""
    whole = stored.shape
    return (
        len(whole) == len(offsets) > 0
        and target.shape == lengths
        and lengths[1:] == whole[1:]
        and 0 <= offsets[0] <= whole[0] - lengths[0]
        and not any(offsets[1:])
        and target.stride() == stored.strides
        and target.is_contiguous()
        and target.nbytes > 0
    )


def _scattered(lengths: Sequence[int], stored: StoredTensor, strides: Sequence[int]) -> bool:
    """Whether the copy would be very many runs of very few bytes."""
    run = 1
    for length, src, dst in reversed(list(zip(lengths, stored.strides, strides, strict=True))):
        if length == 1:
            continue
        if src != run or dst != run:
            break
        run *= length
    runs = math.prod(lengths) // run
    return runs > _MANY_RUNS and run * stored.dtype.itemsize < _SHORT_RUN_BYTES


def _extents(stored: StoredTensor, first: int, lengths: Sequence[int], target: torch.Tensor) -> list[ExtentRow]:
    return view_extents(
        stored.file,
        first,
        stored.dtype.itemsize,
        lengths,
        src_strides=stored.strides,
        dst_strides=target.stride(),
        address=target.data_ptr(),
    )


def _dot(offsets: Sequence[int], strides: Sequence[int]) -> int:
    return sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
