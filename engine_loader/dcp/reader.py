"""Reads DCP checkpoints: the metadata without running what it names, the tensors directly into their targets."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeAlias, cast

import torch
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ..errors import CheckpointError
from ..formats.item_expansion import check_expansion
from ..loading.training.boxes import BoxRead, StoredTensor
from ..loading.training.files import DcpFiles
from ..loading.training.inert_items import NotInertError, check_inert
from ..loading.training.items import Items
from ..loading.training.torch_load import check_not_quantised, load_item, torch_load_words
from ..settings import LoaderSettings, load_settings
from ..sources.registry import make_source
from ..sources.source import Source
from ..transfer.protocol import Transfer

_FIRST_GROUP_BYTES, _GROUP_BYTES = 32 << 20, 2 << 30
_BESIDE_BYTES = 256 << 20
"""As many bytes of a group are read into separate memory and then copied (CUDA, another element type)."""
_LOCATED_AT_ONCE = 4096
_GROUPS_IN_FLIGHT = 16
_Wanted: TypeAlias = tuple[ReadItem, _StorageInfo]
_Sizes: TypeAlias = Callable[[ReadItem], torch.Size | None]
"""The sizes, in the metadata, of the chunk that an item is read from; None if they are not known."""
_Reading: TypeAlias = tuple[ReadItem, torch.Tensor, BoxRead]


class UnreadMetadata(Metadata):
    """Stands for metadata that could not be read, until the reader is set up with it."""

    def __init__(self, error: CheckpointError) -> None:
        super().__init__({})
        self.error = error


def told_at_set_up(read: Callable[..., Metadata]) -> Callable[..., Metadata]:
    """Decorates ``read_metadata`` so that its first error is not lost.

    ``dcp.load`` asks for the metadata, then for that of its rank, catches what both raise, and up to torch 2.11 ends
    with a bare AssertionError. So the second question is answered, and ``set_up_storage_reader``, which comes next and
    is not caught, raises the first error.
    """

    @wraps(read)
    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return read(self, *args, **kwargs)
        except CheckpointError as error:
            if "rank" in kwargs and self._unread is not None:
                return UnreadMetadata(self._unread)
            self._unread = error
            raise

    return read_metadata


class FileSystemReader(torch_filesystem.FileSystemReader):
    """Replaces ``torch.distributed.checkpoint.FileSystemReader`` in ``dcp.load``.

    Several native threads read tensors, both of ``torch.save`` and of safetensors items. They read only the bytes that
    the plan needs, directly into the tensors of the state dict that are in CPU memory and of the stored element type.
    Other tensors (CUDA, another element type, transforms) are read into separate memory and copied.

    ``.metadata`` is read without running what it names. The planner unpickles items that are not tensors only after
    ``torch.load(weights_only=True)`` has accepted them, or where they are found to hold plain data: numpy's arrays and
    scalars, dates, paths, deques and the like.

    Args:
        path: the checkpoint's directory.
        _extension_registry: has the transforms with which the items were written.
        trust_pickles: also unpickle items that ``weights_only`` refuses: the author of the checkpoint can then run code
            here.
        options: settings of the loader by name, e.g. ``threads=8`` (see ``engine-loader settings``).

    Raises (when it loads; ``dcp.load`` may wrap it in its CheckpointException):
        CheckpointError: a file is missing, cut short or damaged, or metadata and files contradict each other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: ExtensionRegistry | None = None,
        *,
        trust_pickles: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(path, _extension_registry)
        self._trust_pickles = trust_pickles
        self._tensors: dict[str, Any] = {}
        self._unread: CheckpointError | None = None
        self._settings: LoaderSettings = load_settings(
            options, extra_origin="the arguments of FileSystemReader"
        ).settings.loader

    @told_at_set_up
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata.

        Raises:
            CheckpointError: the metadata is missing or wrong, or names what no checkpoint needs; nothing was run.
        """
        path = os.fspath(self._get_metadata_path(kwargs.get("rank")))
        with self._files() as files:
            metadata = files.read_metadata(os.path.basename(path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        cast(StorageMeta, metadata.storage_meta).load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Carry out a plan.

        Raises:
            CheckpointError: an item cannot be read; the state dict then holds unspecified values.
        """
        with self._files() as files:
            tensors: list[_Wanted] = []
            for item in plan.items:
                info = self._info(item)
                if item.type == LoadItemType.BYTE_IO:
                    self._load_bytes(files, item, info, planner)
                elif info.transform_descriptors:
                    tensor = self._transformed(files, item, info)
                    _copy(files, item, info, tensor, planner)
                else:
                    tensors.append((item, info))
            tensors.sort(key=_file_order)
            _read_tensors(files, tensors, self._chunk_sizes, planner)
            files.verify_unchanged()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keep the metadata of the tensors, with which the files are compared.

        Raises:
            CheckpointError: why the metadata could not be read, where ``dcp.load`` goes on without it.
        """
        if isinstance(metadata, UnreadMetadata):
            raise metadata.error
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def _chunk_sizes(self, item: ReadItem) -> torch.Size | None:
        """The sizes, in the metadata, of the chunk that an item is read from; None if there is no such chunk."""
        index = item.storage_index
        entry = self._tensors.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata):
            return None
        if index.offset is None:
            return entry.size
        if index.index is not None and index.index < len(entry.chunks):
            hinted = entry.chunks[index.index]
            if hinted.offsets == index.offset:
                return hinted.sizes
        return next((chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset), None)

    def _files(self) -> DcpFiles:
        return DcpFiles(self._source(), os.fspath(self.path), self._settings)

    def _source(self) -> Source:
        """The source that opens the checkpoint's files."""
        return make_source(self._settings.backend, None, self._settings)

    def _info(self, item: ReadItem) -> _StorageInfo:
        try:
            return cast(_StorageInfo, self.storage_data[item.storage_index])
        except KeyError:
            raise CheckpointError(
                f"the metadata does not say in which file {item.storage_index.fqn!r} at {item.storage_index.offset} is",
                file=os.fspath(self.path),
            ) from None

    def _load_bytes(self, files: DcpFiles, item: ReadItem, info: _StorageInfo, planner: LoadPlanner) -> None:
        content = files.read_item(info, item.storage_index.fqn)
        if info.transform_descriptors:
            content = self._plain_stream(item, info, content)
        if not self._trust_pickles:
            _check_pickle(content, item, files, info)
        planner.load_bytes(item, io.BytesIO(content))

    def _transformed(self, files: DcpFiles, item: ReadItem, info: _StorageInfo) -> torch.Tensor:
        name = item.storage_index.fqn
        content = self._plain_stream(item, info, files.read_item(info, name))
        return load_item(content, name, _path(files, info), info.offset)

    def _plain_stream(self, item: ReadItem, info: _StorageInfo, content: bytes) -> bytes:
        """The bytes of an item before its transforms."""
        stream = self.transforms.transform_load_stream(item, info.transform_descriptors or (), io.BytesIO(content))
        return stream.read(-1)


def _check_pickle(content: bytes, item: ReadItem, files: DcpFiles, info: _StorageInfo) -> None:
    name = item.storage_index.fqn
    try:
        check_expansion(content)
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        try:
            check_inert(content)
            return
        except NotInertError as found:
            named = str(found)
        raise CheckpointError(
            f"{name!r} is not a tensor, and torch.load(weights_only=True) refuses it: {torch_load_words(error)}; "
            f"not known to be plain data: {named}",
            file=_path(files, info),
            offset=info.offset,
            hint="nothing was run; if you trust the checkpoint: give the reader trust_pickles=True, "
            "or torch.serialization.add_safe_globals",
        ) from error


def _read_tensors(files: DcpFiles, items: Sequence[_Wanted], sizes_of: _Sizes, planner: LoadPlanner) -> None:
    """Read tensors in groups: while one group is read, the next groups are planned.

    The locations of tensors are read for many groups ahead, because each of these reads waits for the groups in flight.
    """
    in_flight: deque[tuple[Transfer | None, list[_Reading]]] = deque()
    beside = 0
    try:
        for group in _groups(files, items, sizes_of, planner):
            beside += _bytes_beside(group)
            in_flight.append((files.submit([part for _, _, part in group]), group))
            # Whoever waits here does not plan, so that readers have nothing to do when they are done.
            while len(in_flight) >= _GROUPS_IN_FLIGHT or (beside > _BESIDE_BYTES and len(in_flight) > 1):
                _land(*in_flight[0], planner)
                beside -= _bytes_beside(in_flight.popleft()[1])
        while in_flight:
            _land(*in_flight[0], planner)
            in_flight.popleft()
    except BaseException:
        for transfer, _ in in_flight:
            if transfer is not None:
                transfer.cancel()
        raise


def _bytes_beside(group: Sequence[_Reading]) -> int:
    """How much memory beside its targets a group takes."""
    return sum(part.nbytes for _, _, part in group if part.pending is not None)


def _groups(
    files: DcpFiles, items: Sequence[_Wanted], sizes_of: _Sizes, planner: LoadPlanner
) -> Iterator[list[_Reading]]:
    """Groups of tensors that are read together: small groups first, so that reading begins soon, then larger ones. At
    most ``_BESIDE_BYTES`` of a group are read into separate memory."""
    enough = _FIRST_GROUP_BYTES
    stored_items = Items(files)
    for begin in range(0, len(items), _LOCATED_AT_ONCE):
        batch = items[begin : begin + _LOCATED_AT_ONCE]
        located = stored_items.locating([(item.storage_index.fqn, info) for item, info in batch])
        group: list[_Reading] = []
        nbytes = beside = 0
        for wanted, stored in zip(batch, located, strict=True):
            reading = _reading(files, wanted, stored, sizes_of, planner)
            if reading is None:
                continue
            part = reading[2]
            group.append(reading)
            nbytes += wanted[1].length
            if part.pending is not None:
                beside += part.nbytes
            if nbytes >= enough or beside >= _BESIDE_BYTES:
                yield group
                group, nbytes, beside, enough = [], 0, 0, min(2 * enough, _GROUP_BYTES)
        if group:
            yield group


def _reading(
    files: DcpFiles, wanted: _Wanted, stored: StoredTensor | None, sizes_of: _Sizes, planner: LoadPlanner
) -> _Reading | None:
    """What must be read for an item; None if the item was read whole, by torch, because its layout is unknown."""
    item, info = wanted
    if stored is None:
        name = item.storage_index.fqn
        content = files.read_item(info, name)
        _copy(files, item, info, load_item(content, name, _path(files, info), info.offset), planner)
        return None
    sizes = sizes_of(item)
    if sizes is not None and stored.shape != sizes:
        raise CheckpointError(
            f"{stored.name!r} is {list(stored.shape)} in the file, but {list(sizes)} in the metadata",
            file=_path(files, info),
            offset=info.offset,
            hint="metadata and files are of different saves: copy the checkpoint again",
        )
    target = planner.resolve_tensor(item)
    return item, target, files.part(stored, item.storage_offsets, item.lengths, target.detach())


def _land(transfer: Transfer | None, group: Sequence[_Reading], planner: LoadPlanner) -> None:
    if transfer is not None:
        transfer.wait()
    for item, target, part in group:
        part.finish()
        planner.commit_tensor(item, target.detach())


def _copy(files: DcpFiles, item: ReadItem, info: _StorageInfo, tensor: torch.Tensor, planner: LoadPlanner) -> None:
    """Copy the part that the plan needs of a whole item in memory into its target."""
    target = planner.resolve_tensor(item).detach()
    if not target.is_quantized:
        check_not_quantised(tensor.dtype, item.storage_index.fqn, _path(files, info), info.offset)
    for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=False)):
        if dim >= tensor.dim() or begin + length > tensor.shape[dim]:
            break
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, begin, length)
    if tensor.shape != target.shape:
        raise CheckpointError(
            f"{item.storage_index.fqn!r}: {list(tensor.shape)} of the checkpoint does not fit the target's "
            f"{list(target.shape)}",
            file=_path(files, info),
            offset=info.offset,
        )
    target.copy_(tensor)
    planner.commit_tensor(item, target)


def _file_order(wanted: _Wanted) -> tuple[str, int]:
    return wanted[1].relative_path, wanted[1].offset


def _path(files: DcpFiles, info: _StorageInfo) -> str:
    return os.path.join(files.directory, info.relative_path)
