"""The ``.metadata`` of a torch.distributed.checkpoint (DCP) directory, read without running what is in it.

The file is a pickle. ``dcp_records`` reads it into records, and torch's ``Metadata`` is built here from their checked
fields. Facts about the file are those of torch 2.13 (``torch/distributed/checkpoint/metadata.py`` and
``filesystem.py``), and of the older names that it still reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import CheckpointError
from ..garbage import no_garbage_collection
from .dcp_checks import DAMAGED, MetadataChecks
from .dcp_records import (
    BytesRecord,
    CallRecord,
    ChunkRecord,
    FieldsRecord,
    FrozensetRecord,
    IndexRecord,
    LayoutRecord,
    MemoryFormatRecord,
    MetadataRecord,
    PathRecord,
    PropertiesRecord,
    SizeRecord,
    StorageInfoRecord,
    StorageMetaRecord,
    TensorRecord,
    TupleRecord,
    read_records,
    short,
)

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    _Form: TypeAlias = tuple[torch.dtype, torch.layout, torch.memory_format]

MAX_METADATA_BYTES = 1 << 30
"""Nothing longer is read into memory; a chunk of a tensor takes about 200 bytes."""
_FEW_CHUNKS, _BYTES_PER_CHUNK = 1024, 16
"""So many chunks, and one more for so many bytes of the file: a list that several tensors share counts for each."""
_PLAIN = frozenset({str, int, float, bytes, type(None)})
_TUPLES = frozenset({tuple, TupleRecord})
_CONTAINERS = {list: list, tuple: tuple, TupleRecord: tuple, set: set, FrozensetRecord: frozenset}
_HASHED = frozenset({set, FrozensetRecord})
_MOST_KEY_ITEMS = 64


def parse_metadata(content: bytes, file: str) -> Metadata:
    """torch's ``Metadata`` from the content of a ``.metadata`` file.

    Args:
        content: of the file.
        file: its path, for messages.

    Raises:
        CheckpointError: it names something that no checkpoint needs (nothing was run), is damaged, or has values that
            contradict each other: a chunk outside its tensor, a file outside the checkpoint's directory, a negative
            length.
    """
    if len(content) > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"the metadata has {len(content)} bytes, more than the {MAX_METADATA_BYTES} that are read", file=file
        )
    try:
        with no_garbage_collection():
            return _Builder(file, _FEW_CHUNKS + len(content) // _BYTES_PER_CHUNK).metadata(read_records(content, file))
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError("the metadata is nested too deeply", file=file, hint=DAMAGED) from None
    # What a damaged pickle raises is not limited to UnpicklingError (see pickle's documentation).
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the metadata cannot be read: {short(text)}", file=file, hint=DAMAGED) from None


class _Builder:
    """Builds torch's objects from records: one object of a record to which the pickle refers many times."""

    def __init__(self, file: str, most_chunks: int) -> None:
        import torch
        from torch.distributed.checkpoint import filesystem, metadata

        self._torch, self._classes, self._storage_info = torch, metadata, filesystem._StorageInfo
        self._checks = MetadataChecks(file)
        self._most_chunks = most_chunks
        self._checked_files: set[str] = set()
        self._sizes: dict[SizeRecord, torch.Size] = {}
        # By the ids of objects of the pickle, which exist for as long as the builder does.
        self._found_properties: dict[tuple[int, int, int], _Form] = {}
        self._plains: dict[int, Any] = {}

    def metadata(self, record: Any) -> Metadata:
        fields = self._checks.fields(record, MetadataRecord, "Metadata")
        tensors = self._checks.instance(fields.get("state_dict_metadata"), dict, "state_dict_metadata")
        storage = fields.get("storage_data")
        metadata = self._classes.Metadata(
            self._entries(tensors),
            self._plain(fields.get("planner_data")),
            None if storage is None else self._storage_data(storage),
        )
        # Not every torch that is supported has these.
        if fields.get("storage_meta") is not None:
            metadata.storage_meta = self._storage_meta(fields["storage_meta"])
        if isinstance(fields.get("version"), str):
            metadata.version = fields["version"]
        return metadata

    def _entries(self, records: dict[Any, Any]) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
        classes = self._classes
        chunk_lists: dict[int, list[ChunkStorageMetadata]] = {}
        fitting: set[tuple[int, int, int]] = set()
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, record in records.items():
            self._checks.instance(name, str, "a name")
            if type(record) is BytesRecord:
                entries[name] = classes.BytesStorageMetadata()
                continue
            fields = self._checks.fields(record, TensorRecord, "TensorStorageMetadata")
            whole = self._size(fields.get("size"))
            found = fields.get("chunks")
            chunks = chunk_lists.get(id(found))
            if chunks is None:
                chunks = chunk_lists[id(found)] = self._chunks(found)
            # Each tensor of those that share a list takes as much work as one with a list of its own.
            self._most_chunks -= len(chunks)
            if self._most_chunks < 0:
                self._checks.refuse(
                    "tensors share lists of chunks so that there are more chunks than the file can hold"
                )
            for chunk in chunks:
                # Equal sizes are one object here, and the layers of a model have equal ones.
                fit = (id(chunk.offsets), id(chunk.sizes), id(whole))
                if fit not in fitting:
                    self._checks.within_tensor(name, chunk.offsets, chunk.sizes, whole)
                    fitting.add(fit)
            properties = self._properties(fields.get("properties"))
            entries[name] = classes.TensorStorageMetadata(properties, whole, chunks)
        return entries

    def _chunks(self, records: Any) -> list[ChunkStorageMetadata]:
        chunks = []
        for record in self._checks.instance(records, list, "chunks"):
            fields = record[-1] if type(record) is ChunkRecord and record else None
            if type(fields) is not dict:
                fields = self._checks.fields(record, ChunkRecord, "ChunkStorageMetadata")
            sizes = self._size(fields.get("offsets")), self._size(fields.get("sizes"))
            chunks.append(self._classes.ChunkStorageMetadata(*sizes))
        return chunks

    def _properties(self, record: Any) -> TensorProperties:
        state: Any = record[-1] if type(record) is PropertiesRecord and record else None
        if type(state) not in _TUPLES or len(state) != 5:
            self._checks.refuse(f"the properties of a tensor are {short(record)}")
        dtype, layout, requires_grad, memory_format, pin_memory = state
        key = (id(dtype), id(layout), id(memory_format))
        found = self._found_properties.get(key)
        if found is None:
            found = self._found_properties[key] = self._new_properties(state)
        return self._classes.TensorProperties(found[0], found[1], bool(requires_grad), found[2], bool(pin_memory))

    def _new_properties(self, state: tuple[Any, ...]) -> _Form:
        dtype, layout, _, memory_format, _ = state
        if not isinstance(dtype, self._torch.dtype):
            self._checks.refuse(f"the element type in the properties of a tensor is {short(dtype)}")
        return dtype, self._layout(layout), self._memory_format(memory_format)

    def _memory_format(self, record: Any) -> torch.memory_format:
        formats = (self._torch.contiguous_format, self._torch.channels_last, self._torch.preserve_format)
        number = record.args[0] if isinstance(record, MemoryFormatRecord) and record.args else None
        if number not in (0, 1, 2):
            self._checks.refuse(
                f"the memory format in the properties of a tensor is {short(record if number is None else number)}"
            )
        return formats[number]

    def _layout(self, record: Any) -> torch.layout:
        name = record.args[0] if isinstance(record, LayoutRecord) and record.args else None
        layout = vars(self._torch).get(name.removeprefix("torch.")) if isinstance(name, str) else None
        if not isinstance(layout, self._torch.layout):
            self._checks.refuse(f"a tensor has the layout {short(name)}")
        return layout

    def _storage_data(self, records: Any) -> dict[MetadataIndex, _StorageInfo]:
        entries = self._checks.instance(records, dict, "storage_data")
        return {self._index(key): self._storage(info) for key, info in entries.items()}

    def _index(self, record: Any) -> MetadataIndex:
        fields = record[-1] if type(record) is IndexRecord and record else None
        if type(fields) is not dict:
            fields = self._checks.fields(record, IndexRecord, "MetadataIndex")
        offset, index = fields.get("offset"), fields.get("index")
        name = fields.get("fqn")
        return self._classes.MetadataIndex(
            name if type(name) is str else self._checks.instance(name, str, "the name in an index"),
            None if offset is None else self._size(offset),
            index
            if index is None or type(index) is int
            else self._checks.instance(index, int, "the number in an index"),
        )

    def _storage(self, record: Any) -> _StorageInfo:
        fields = record[-1] if type(record) is StorageInfoRecord and record else None
        if type(fields) is not dict:
            fields = self._checks.fields(record, StorageInfoRecord, "_StorageInfo")
        path: Any = fields.get("relative_path")
        if type(path) is not str:
            self._checks.instance(path, str, "the file of an item")
        offset = self._checks.natural(fields.get("offset"), "the offset of an item")
        length = self._checks.natural(fields.get("length"), "the length of an item")
        if path not in self._checked_files:
            self._checks.file_name(path)
            self._checked_files.add(path)
        descriptors = fields.get("transform_descriptors")
        names = None if descriptors is None else self._transforms(descriptors)
        return self._storage_info(path, offset, length, names)

    def _transforms(self, value: Any) -> list[str]:
        names = self._checks.instance(value, (list, tuple), "transforms")
        return [self._checks.instance(name, str, "a transform") for name in names]

    def _storage_meta(self, record: Any) -> StorageMeta:
        fields = self._checks.fields(record, StorageMetaRecord, "StorageMeta")
        return self._classes.StorageMeta(
            self._plain(fields.get("checkpoint_id")),
            self._plain(fields.get("save_id")),
            self._plain(fields.get("load_id")),
            self._checks.instance(self._plain(fields.get("modules")) or [], list, "modules"),
        )

    def _size(self, value: Any) -> torch.Size:
        # False == 0 == 0.0, but only sizes of integers are kept here, and a size that equals one of them is as good.
        known = self._sizes.get(value) if type(value) is SizeRecord else None
        if known is None:
            known = self._sizes[value] = self._torch.Size(self._checks.size(value))
        return known

    def _plain(self, value: Any) -> Any:
        """What a planner stored: containers of plain values, unchanged. A container that is shared is built once."""
        if type(value) in _PLAIN:
            return value
        known = self._plains.get(id(value))
        if known is None:
            known = self._plains[id(value)] = self._new_plain(value)
        return known

    def _key(self, value: Any) -> Any:
        """A key of a dict or an element of a set of a planner: a plain value, or a short tuple of plain values.

        The hash of nested tuples can take time beyond all bounds.
        """
        plain = self._plain(value)
        if type(plain) in (tuple, frozenset) and not (
            len(plain) <= _MOST_KEY_ITEMS and all(type(item) in _PLAIN for item in plain)
        ):
            self._checks.refuse(
                f"a key in the planner's data is {short(plain)}, which is not a short tuple of plain values"
            )
        return plain

    def _new_plain(self, value: Any) -> Any:
        if isinstance(value, SizeRecord):
            return self._size(value)
        if isinstance(value, PathRecord):
            return Path(*(self._checks.instance(part, str, "a part of a path") for part in value.args))
        if isinstance(value, dict):
            return {key if type(key) in _PLAIN else self._key(key): self._plain(item) for key, item in value.items()}
        kind = _CONTAINERS.get(type(value))
        if kind is not None:
            if _PLAIN.issuperset(map(type, value)):
                return kind(value)
            plain = self._key if type(value) in _HASHED else self._plain
            return kind(plain(item) for item in value)
        if isinstance(value, (type, FieldsRecord, CallRecord)):
            self._checks.refuse(f"the planner's data holds {short(value)}")
        return value
