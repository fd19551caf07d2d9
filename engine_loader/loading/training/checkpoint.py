"""A training's checkpoint (torch.distributed.checkpoint, DCP), served like any other, its chunks put together."""

from __future__ import annotations

import itertools
import math
import operator
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...errors import CheckpointError, TensorNotFoundError
from ...formats.safetensors import TensorInfo
from ...report.load import LoadReport
from ...settings import LoaderSettings
from ...sources.source import Source
from ...transfer.protocol import Transfer
from ..checkpoint import Checkpoint
from ..find import natural_key, without_end
from ..slices import Index, TensorSlice
from ..targets import check_target, check_targets_apart
from .files import DcpFiles, Part, StoredTensor, dtype_name, load_item
from .key_mapping import KeyMapping, Renamer, make_renamer

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_OPTIMIZER = re.compile(r"optim(izer)?s?(_states?|_state_dicts?)?")
_MANY_CHUNKS = 4096
"""Whether more than these overlap is not looked at: that they have the right size together must do."""


@dataclass(frozen=True, slots=True)
class DcpChunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: _StorageInfo


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A tensor of the checkpoint: ``stored_name`` is what the training called it."""

    name: str
    stored_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[DcpChunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def info(self, file: str, offset: int) -> TensorInfo:
        # What safetensors has no name for goes by torch's.
        dtype = dtype_name(self.dtype) or str(self.dtype).removeprefix("torch.")
        return TensorInfo(self.name, dtype, self.shape, file, offset, self.nbytes)


class DcpCheckpoint(Checkpoint):
    """An open DCP directory; see ``Checkpoint``. ``info`` tells the file and the offset of a tensor's first chunk.

    Args:
        source: where it is.
        directory: its path.
        settings: how to read.
        device: where tensors are put.
        key_mapping: from the training's names to those that are wanted (see key_mapping.py); None: the setting.
        optimizer_state: also serve the tensors of optimizers, which are not looked at otherwise.

    Attributes:
        files: its files.

    Raises:
        CheckpointError: the metadata is missing or wrong, or two tensors get the same name.
    """

    def __init__(
        self,
        source: Source,
        directory: str,
        settings: LoaderSettings,
        device: torch.device,
        *,
        key_mapping: KeyMapping | None = None,
        optimizer_state: bool = False,
    ) -> None:
        self._device = device
        self._buffer_bytes = int(settings.buffer_bytes)
        self.files = DcpFiles(source, without_end(directory), settings)
        try:
            rename = make_renamer(settings.key_mapping if key_mapping is None else key_mapping)
            metadata = self.files.read_metadata()
            self._tensors = _tensors(metadata, self.files, rename, optimizer_state)
            self._metadata = metadata
        except BaseException:
            self.files.close()
            raise
        self._infos = {name: tensor.info(*self._first_place(tensor)) for name, tensor in self._tensors.items()}

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensor(name)
        if not tensor.chunks:
            return self._infos[name]
        (stored,) = self.files.locate([(tensor.stored_name, tensor.chunks[0].place)])
        return self._infos[name] if stored is None else tensor.info(self.files.path_of(stored.file), stored.offset)

    def metadata(self) -> dict[str, str]:
        """Nothing: a DCP checkpoint has none of this kind."""
        return {}

    def tensors(
        self, names: Iterable[str] | None = None, *, report: LoadReport | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = None if names is None else {self._tensor(name).name for name in names}
        return self._all([name for name in self._tensors if wanted is None or name in wanted], report or LoadReport())

    def stream(self, names: Iterable[str], report: LoadReport) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in the order of ``names``, reading ahead; the account stays open."""
        return self._ahead([self._tensor(name) for name in names], report)

    @property
    def stored_tensors(self) -> list[DcpTensor]:
        """All that are served, with their chunks, in the order of their files."""
        return list(self._tensors.values())

    def located(self) -> list[tuple[DcpTensor, list[StoredTensor | None]]]:
        """Every tensor, and where each of its chunks lies; None for what is no plain bytes."""
        tensors = self.stored_tensors
        places = iter(self._locate(tensors))
        return [(tensor, list(itertools.islice(places, len(tensor.chunks)))) for tensor in tensors]

    def get_slice(self, name: str) -> TensorSlice:
        return _DcpSlice(self._tensor(name), self._infos[name], self)

    def other_items(self) -> dict[str, Callable[[], bytes]]:
        """What is no tensor, by its name in the training: how its bytes are read, as ``torch.save`` wrote them."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        entries = self._metadata.state_dict_metadata
        return {
            index.fqn: partial(self._read_other, index.fqn, place)
            for index, place in (self._metadata.storage_data or {}).items()
            if isinstance(entries.get(index.fqn), BytesStorageMetadata)
        }

    def state_paths(self) -> dict[str, tuple[Any, ...]]:
        """The keys under which each item was in the nested state dict, by its name there."""
        return dict(_paths(self._metadata))

    def _read_other(self, name: str, place: _StorageInfo) -> bytes:
        self._check_plain(name, place)
        return self.files.read_item(place, name)

    def load_into(self, targets: Mapping[str, torch.Tensor], *, report: LoadReport | None = None) -> None:
        report = report or LoadReport()
        pairs = [(self._tensor(name), target) for name, target in targets.items()]
        for tensor, target in pairs:
            _check_target(tensor, self._infos[tensor.name], target)
        check_targets_apart(
            [(self._infos[tensor.name], target) for tensor, target in pairs if target.device.type == "cpu"]
        )
        self._locate([tensor for tensor, _ in pairs])
        parts: list[Part] = []
        for tensor, target in pairs:
            parts += self.parts(tensor, [0] * len(tensor.shape), tensor.shape, target.detach())
            report.count_tensor(self._infos[tensor.name])
            if sum(part.nbytes for part in parts if part.pending is not None) > self._buffer_bytes:
                self.files.read(parts)
                parts = []
        self.files.read(parts)
        self.files.finish(report)

    def close(self) -> None:
        self.files.close()

    def read(self, tensor: DcpTensor, begin: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """A box of a tensor, as a new CPU tensor."""
        read = _empty(tensor, lengths)
        self.files.read(self.parts(tensor, begin, lengths, read))
        return read

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the checkpoint's device."""
        return tensor.to(self._device)

    def parts(
        self, tensor: DcpTensor, begin: Sequence[int], lengths: Sequence[int], target: torch.Tensor
    ) -> list[Part]:
        """The reads that bring a box of a tensor to ``target``, one of each chunk that has some of it."""
        cuts = [(chunk, _cut(chunk, begin, lengths)) for chunk in tensor.chunks]
        wanted = [(chunk, cut) for chunk, cut in cuts if cut is not None]
        located = self.files.locate([(tensor.stored_name, chunk.place) for chunk, _ in wanted])
        parts = []
        for (chunk, (low, sizes)), stored in zip(wanted, located, strict=True):
            within = target
            for dim, (first, size) in enumerate(zip(low, sizes, strict=True)):
                within = within.narrow(dim, first - begin[dim], size)
            inside = [first - offset for first, offset in zip(low, chunk.offsets, strict=True)]
            if stored is not None and stored.shape == chunk.sizes and stored.dtype == tensor.dtype:
                parts.append(self.files.part(stored, inside, sizes, within))
            else:
                whole = self._load(tensor, chunk)
                for dim, (first, size) in enumerate(zip(inside, sizes, strict=True)):
                    whole = whole.narrow(dim, first, size)
                with torch.no_grad():
                    within.copy_(whole)
        return parts

    def _locate(self, tensors: Sequence[DcpTensor]) -> list[StoredTensor | None]:
        """Find all at once where they lie: one after the other would wait for what is being read."""
        return self.files.locate([(tensor.stored_name, chunk.place) for tensor in tensors for chunk in tensor.chunks])

    def _load(self, tensor: DcpTensor, chunk: DcpChunk) -> torch.Tensor:
        """A chunk that is not plain bytes."""
        path = os.path.join(self.files.directory, chunk.place.relative_path)
        self._check_plain(tensor.stored_name, chunk.place)
        content = self.files.read_item(chunk.place, tensor.stored_name)
        whole = load_item(content, tensor.stored_name, path, chunk.place.offset)
        if tuple(whole.shape) != chunk.sizes or whole.dtype != tensor.dtype:
            raise CheckpointError(
                f"{tensor.stored_name!r} is {whole.dtype} {list(whole.shape)} in the file, "
                f"but {tensor.dtype} {list(chunk.sizes)} by the metadata",
                file=path,
                offset=chunk.place.offset,
                hint="metadata and files are of different saves",
            )
        return whole

    def _check_plain(self, name: str, place: _StorageInfo) -> None:
        if place.transform_descriptors:
            raise CheckpointError(
                f"{name!r} was transformed when it was saved ({place.transform_descriptors})",
                file=os.path.join(self.files.directory, place.relative_path),
                hint="load it by dcp.load with engine_loader.dcp.FileSystemReader, and save it without transforms",
            )

    def _all(self, names: Iterable[str], report: LoadReport) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.stream(names, report)
        self.files.finish(report)

    def _ahead(self, tensors: Sequence[DcpTensor], report: LoadReport) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors while the next ones are read."""
        self._locate(tensors)
        flying: deque[tuple[DcpTensor, torch.Tensor, Transfer | None, list[Part]]] = deque()
        coming = iter(tensors)
        nbytes = peak_bytes = 0
        try:
            while True:
                for tensor in coming:
                    target = _empty(tensor, tensor.shape)
                    parts = self.parts(tensor, [0] * len(tensor.shape), tensor.shape, target)
                    flying.append((tensor, target, self.files.submit(parts), parts))
                    nbytes += tensor.nbytes
                    peak_bytes = max(peak_bytes, nbytes)
                    if nbytes >= self._buffer_bytes:
                        break
                if not flying:
                    break
                tensor, target, transfer, parts = flying[0]
                if transfer is not None:
                    transfer.wait()
                for part in parts:
                    part.finish()
                flying.popleft()
                nbytes -= tensor.nbytes
                report.count_tensor(self._infos[tensor.name])
                del parts, transfer
                yield tensor.name, self.place(target)
        finally:
            for _, _, transfer, _ in flying:
                if transfer is not None:
                    transfer.cancel()
            report.note_peak_buffer(peak_bytes)

    def _tensor(self, name: str) -> DcpTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise TensorNotFoundError.among(name, self._tensors, self.files.metadata_path) from None

    def _first_place(self, tensor: DcpTensor) -> tuple[str, int]:
        if not tensor.chunks:
            return self.files.metadata_path, 0
        place = tensor.chunks[0].place
        return os.path.join(self.files.directory, place.relative_path), place.offset


class _DcpSlice(TensorSlice):
    """Integers, slices and ``...`` read the box that they span; every other index reads the whole tensor."""

    def __init__(self, tensor: DcpTensor, info: TensorInfo, checkpoint: DcpCheckpoint) -> None:
        self._info = info
        self._tensor = tensor
        self._checkpoint = checkpoint
        self._meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def __getitem__(self, index: Index) -> torch.Tensor:
        found = _box(index, self._meta)
        shape = self._tensor.shape
        if found is None:
            whole = self._checkpoint.read(self._tensor, [0] * len(shape), shape)
            return self._checkpoint.place(whole[index])
        begin, lengths, rest = found
        return self._checkpoint.place(self._checkpoint.read(self._tensor, begin, lengths)[rest].contiguous())


def _box(index: Index, meta: torch.Tensor) -> tuple[list[int], list[int], tuple[Any, ...]] | None:
    """(first element, lengths, what is left to index there) of the box that an index spans; None: all of it."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is Ellipsis or isinstance(item, slice) or _is_integer(item) for item in items):
        return None
    _ = meta[tuple(items)]  # raises what torch raises
    taken = sum(item is not None and item is not Ellipsis for item in items)
    missing = [slice(None)] * (meta.dim() - taken)
    at = next((number for number, item in enumerate(items) if item is Ellipsis), len(items))
    begin: list[int] = []
    lengths: list[int] = []
    rest: list[Any] = []
    for item in [*items[:at], *missing, *(item for item in items[at:] if item is not Ellipsis)]:
        if item is None:
            rest.append(None)
            continue
        size = meta.shape[len(begin)]
        if isinstance(item, slice):
            first, last, step = item.indices(size)
            begin.append(min(first, size))
            lengths.append(max(0, last - first))
            rest.append(slice(None, None, step))
        else:
            begin.append(operator.index(item) % size)
            lengths.append(1)
            rest.append(0)
    return begin, lengths, tuple(rest)


def _is_integer(item: Any) -> bool:
    if isinstance(item, bool | torch.Tensor):
        return False
    try:
        operator.index(item)
    except TypeError:
        return False
    return True


def _tensors(metadata: Metadata, files: DcpFiles, rename: Renamer, optimizer_state: bool) -> dict[str, DcpTensor]:
    """The tensors by their new names, in the order of their files."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    places: dict[tuple[str, tuple[int, ...] | None], _StorageInfo] = {
        (index.fqn, None if index.offset is None else tuple(index.offset)): place
        for index, place in (metadata.storage_data or {}).items()
    }
    paths = _paths(metadata)
    found = []
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if optimizer_state or not _is_optimizer(name, paths.get(name)):
            renamed = rename(name)
            if renamed is not None:
                found.append(_tensor(name, renamed, entry, places, files))
    tensors: dict[str, DcpTensor] = {}
    for tensor in sorted(found, key=_file_order):
        if tensor.name in tensors:
            raise CheckpointError(
                f"{tensors[tensor.name].stored_name!r} and {tensor.stored_name!r} both become {tensor.name!r}",
                file=files.metadata_path,
                hint="correct key_mapping",
            )
        tensors[tensor.name] = tensor
    return tensors


def _paths(metadata: Metadata) -> Mapping[str, Any]:
    return metadata.planner_data if isinstance(metadata.planner_data, dict) else {}


def _tensor(
    stored_name: str,
    name: str,
    entry: TensorStorageMetadata,
    places: Mapping[tuple[str, tuple[int, ...] | None], _StorageInfo],
    files: DcpFiles,
) -> DcpTensor:
    chunks = []
    for chunk in entry.chunks:
        offsets = tuple(chunk.offsets)
        place = places.get((stored_name, offsets)) or places.get((stored_name, None))
        if place is None:
            raise CheckpointError(
                f"the metadata does not say where {stored_name!r} at {list(offsets)} lies", file=files.metadata_path
            )
        chunks.append(DcpChunk(offsets, tuple(chunk.sizes), place))
    _check_cover(stored_name, tuple(entry.size), chunks, files.metadata_path)
    return DcpTensor(name, stored_name, entry.properties.dtype, tuple(entry.size), tuple(chunks))


def _check_cover(name: str, shape: tuple[int, ...], chunks: Sequence[DcpChunk], file: str) -> None:
    """Refuse chunks that leave a hole, which would show what was in memory before."""
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    apart = len(chunks) == 1 or len(chunks) > _MANY_CHUNKS or _are_apart(chunks)
    if covered != math.prod(shape) or not apart:
        raise CheckpointError(
            f"the chunks of {name!r} are not the whole tensor {list(shape)}, each part once",
            file=file,
            hint="a rank's part is missing: was the checkpoint saved by all of them?",
        )


def _are_apart(chunks: Sequence[DcpChunk]) -> bool:
    """Whether no two chunks have an element in common."""
    low = torch.tensor([chunk.offsets for chunk in chunks], dtype=torch.int64)
    high = low + torch.tensor([chunk.sizes for chunk in chunks], dtype=torch.int64)
    apart = torch.zeros(len(chunks), len(chunks), dtype=torch.bool)
    for dim in range(low.shape[1]):
        begin = torch.maximum(low[:, None, dim], low[None, :, dim])
        apart |= begin >= torch.minimum(high[:, None, dim], high[None, :, dim])
    return int((~apart).sum()) <= int((~apart).diagonal().sum())


def _cut(chunk: DcpChunk, begin: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """(first element, lengths) of what a box and a chunk have in common, by the whole tensor's coordinates."""
    low = [max(first, offset) for first, offset in zip(begin, chunk.offsets, strict=True)]
    high = [
        min(first + length, offset + size)
        for first, length, offset, size in zip(begin, lengths, chunk.offsets, chunk.sizes, strict=True)
    ]
    sizes = [end - first for first, end in zip(low, high, strict=True)]
    return None if any(size <= 0 for size in sizes) else (low, sizes)


def _is_optimizer(name: str, path: Any) -> bool:
    """Whether a tensor is of an optimizer's state, by the keys under which it was in the state dict."""
    keys = path if isinstance(path, tuple) and len(path) > 1 else name.split(".")
    return any(isinstance(key, str) and _OPTIMIZER.fullmatch(key.lower()) for key in keys[:-1])


def _file_order(tensor: DcpTensor) -> tuple[Any, ...]:
    if not tensor.chunks:
        return ([], 0)
    place = tensor.chunks[0].place
    return (natural_key(place.relative_path), place.offset)


def _check_target(tensor: DcpTensor, info: TensorInfo, target: torch.Tensor) -> None:
    if dtype_name(tensor.dtype) is not None and dtype_name(tensor.dtype) != "F4":
        check_target(info, target)
    elif target.dtype != tensor.dtype or tuple(target.shape) != tensor.shape:
        raise CheckpointError(
            f"{tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, "
            f"the target is {target.dtype} {list(target.shape)}",
            file=info.file,
        )


def _empty(tensor: DcpTensor, shape: Sequence[int]) -> torch.Tensor:
    try:
        return torch.empty(tuple(shape), dtype=tensor.dtype, device="cpu")
    except RuntimeError as error:
        raise CheckpointError(f"no memory for {tensor.name!r}: {str(error).splitlines()[0]}") from None
