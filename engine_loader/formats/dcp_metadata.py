"""The ``.metadata`` of a torch.distributed.checkpoint (DCP) directory, read without running what is in it.

The file is a pickle, and a pickle can call whatever it names. Here only the names that DCP itself writes are known, and
even they do not become their classes at once: each is a mere record of what the pickle says about it, and from those
torch's ``Metadata`` is built after its fields were checked. Facts about the file are those of torch 2.13
(``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``), and of the older names that it still reads.
"""

from __future__ import annotations

import io
import operator
import pickle
import reprlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from ..errors import CheckpointError
from ..garbage import no_garbage_collection
from .pickle_memo import check_memo

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

METADATA_NAME = ".metadata"
MAX_METADATA_BYTES = 1 << 30
"""Nothing longer is read into memory; a chunk of a tensor takes about 200 bytes."""
_MAX_INT64 = 2**63 - 1
_PLAIN = frozenset({str, int, float, bytes, type(None)})
_CONTAINERS = frozenset({list, tuple, set, frozenset})
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 8, 3, 200, 100
_DAMAGED = "the file is damaged or was not written completely: copy the checkpoint again"


class _Fields(list[Any]):
    """What a pickle says about an object of a known class that has fields: the states that it sets, of which the last
    counts. A list, because there are many, and none is made or filled with Python's help."""

    __slots__ = ()

    # With it, no pickle can set attributes of these classes or their objects.
    __setstate__ = list.append

    def __init__(self, *args: Any) -> None:
        raise pickle.UnpicklingError("a call")

    # They are keys, and a list's text can be much longer than the pickle.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]
    __repr__ = object.__repr__


class _Metadata(_Fields):
    __slots__ = ()


class _Index(_Fields):
    __slots__ = ()


class _Chunk(_Fields):
    __slots__ = ()


class _Tensor(_Fields):
    __slots__ = ()


class _Properties(_Fields):
    __slots__ = ()


class _Bytes(_Fields):
    __slots__ = ()


class _StorageMeta(_Fields):
    __slots__ = ()


class _Storage(_Fields):
    __slots__ = ()


class _Call:
    """What a pickle says about an object of a known class that is made by a call."""

    __slots__ = ("args",)

    args: tuple[Any, ...]

    def __new__(cls, *args: Any) -> _Call:
        call = super().__new__(cls)
        call.args = args
        return call

    # No pickle sets attributes of these classes or their objects.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state")


class _MemoryFormat(_Call):
    __slots__ = ()


class _Layout(_Call):
    __slots__ = ()


class _Path(_Call):
    __slots__ = ()


class _Size(tuple[Any, ...]):
    """What a pickle says about a ``torch.Size``. There are many, and a plain tuple is made without Python's help."""

    __slots__ = ()

    # No pickle sets attributes of this class or its objects.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state")


_DCP = "torch.distributed.checkpoint.metadata"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # where two of the classes were until torch 2.2
_KNOWN: dict[tuple[str, str], type] = {
    (_DCP, "Metadata"): _Metadata,
    (_DCP, "MetadataIndex"): _Index,
    (_DCP, "ChunkStorageMetadata"): _Chunk,
    (_DCP, "TensorStorageMetadata"): _Tensor,
    (_DCP, "TensorProperties"): _Properties,
    (_OLD, "TensorProperties"): _Properties,
    (_DCP, "BytesStorageMetadata"): _Bytes,
    (_DCP, "StorageMeta"): _StorageMeta,
    (_DCP, "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    (_OLD, "MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Storage,
    ("nemo_automodel.components.checkpoint._backports.filesystem", "_StorageInfo"): _Storage,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Layout,
    ("pathlib", "PosixPath"): _Path,
    ("pathlib", "PurePosixPath"): _Path,
    ("pathlib._local", "PosixPath"): _Path,  # Python 3.13
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, file: str) -> None:
        super().__init__(io.BytesIO(content))
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        dtype = _torch_dtype(name) if module == "torch" else None
        if dtype is not None:
            return dtype
        raise CheckpointError(
            f"the metadata names {_short(f'{module}.{name}')}, which no checkpoint needs; nothing of it was run",
            file=self._file,
            hint="do not load it with other readers unless you trust whoever made it: they run what it names",
        )


def parse_metadata(content: bytes, file: str) -> Metadata:
    """torch's ``Metadata`` from the content of a ``.metadata`` file.

    Args:
        content: of the file.
        file: its path, for messages.

    Raises:
        CheckpointError: it names something that no checkpoint needs (nothing was run), is damaged, or says what cannot
            be: a chunk outside its tensor, a file outside the checkpoint's directory, a negative length.
    """
    if len(content) > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"the metadata has {len(content)} bytes, more than the {MAX_METADATA_BYTES} that are read", file=file
        )
    try:
        with no_garbage_collection():
            check_memo(content)
            found = _Unpickler(content, file).load()
            return _Builder(file).metadata(found)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError("the metadata is nested too deeply", file=file, hint=_DAMAGED) from None
    # What a damaged pickle raises is not limited to UnpicklingError (see pickle's documentation).
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the metadata cannot be read: {_short(text)}", file=file, hint=_DAMAGED) from None


class _Builder:
    """Builds torch's objects from records, each once however often it is referred to."""

    def __init__(self, file: str) -> None:
        import torch
        from torch.distributed.checkpoint import filesystem, metadata

        self._torch, self._classes, self._storage_info = torch, metadata, filesystem._StorageInfo
        self._within: set[str] = set()
        self._sizes: dict[_Size, torch.Size] = {}
        self._file = file
        # By the ids of parts of the pickle, which lives as long as the builder is at work.
        self._found_properties: dict[tuple[int, int, int], _Form] = {}
        self._plains: dict[int, Any] = {}

    def metadata(self, record: Any) -> Metadata:
        fields = self._fields(record, _Metadata, "Metadata")
        tensors = self._is(fields.get("state_dict_metadata"), dict, "state_dict_metadata")
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
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, record in records.items():
            self._is(name, str, "a name")
            if type(record) is _Bytes:
                entries[name] = classes.BytesStorageMetadata()
                continue
            fields = self._fields(record, _Tensor, "TensorStorageMetadata")
            whole = self._size(fields.get("size"))
            found = fields.get("chunks")
            # Those of a list that several tensors have are built once: a small file could ask for no end of work.
            chunks = chunk_lists.get(id(found))
            if chunks is None:
                chunks = chunk_lists[id(found)] = self._chunks(found)
            for chunk in chunks:
                if not _is_within(chunk.offsets, chunk.sizes, whole):
                    self._refuse(
                        f"a chunk of {_short(name)} at {list(chunk.offsets)} of size {list(chunk.sizes)} "
                        f"is not within the tensor's {list(whole)}"
                    )
            properties = self._properties(fields.get("properties"))
            entries[name] = classes.TensorStorageMetadata(properties, whole, chunks)
        return entries

    def _chunks(self, records: Any) -> list[ChunkStorageMetadata]:
        chunks = []
        for record in self._is(records, list, "chunks"):
            fields = self._fields(record, _Chunk, "ChunkStorageMetadata")
            sizes = self._size(fields.get("offsets")), self._size(fields.get("sizes"))
            chunks.append(self._classes.ChunkStorageMetadata(*sizes))
        return chunks

    def _properties(self, record: Any) -> TensorProperties:
        state = record[-1] if type(record) is _Properties and record else None
        if type(state) is not tuple or len(state) != 5:
            self._refuse(f"the properties of a tensor are {_short(record)}")
        dtype, layout, requires_grad, memory_format, pin_memory = state
        key = (id(dtype), id(layout), id(memory_format))
        found = self._found_properties.get(key)
        if found is None:
            found = self._found_properties[key] = self._new_properties(state)
        return self._classes.TensorProperties(found[0], found[1], bool(requires_grad), found[2], bool(pin_memory))

    def _new_properties(self, state: tuple[Any, ...]) -> _Form:
        dtype, layout, _, memory_format, _ = state
        formats = (self._torch.contiguous_format, self._torch.channels_last, self._torch.preserve_format)
        number = memory_format.args[0] if isinstance(memory_format, _MemoryFormat) and memory_format.args else None
        if not isinstance(dtype, self._torch.dtype) or number not in (0, 1, 2):
            self._refuse(f"the properties of a tensor are {_short(state)}")
        return dtype, self._layout(layout), formats[number]

    def _layout(self, record: Any) -> torch.layout:
        name = record.args[0] if isinstance(record, _Layout) and record.args else None
        layout = vars(self._torch).get(name.removeprefix("torch.")) if isinstance(name, str) else None
        if not isinstance(layout, self._torch.layout):
            self._refuse(f"a tensor has the layout {_short(name)}")
        return layout

    def _storage_data(self, records: Any) -> dict[MetadataIndex, _StorageInfo]:
        entries = self._is(records, dict, "storage_data")
        return {self._index(key): self._storage(info) for key, info in entries.items()}

    def _index(self, record: Any) -> MetadataIndex:
        fields = self._fields(record, _Index, "MetadataIndex")
        offset, index = fields.get("offset"), fields.get("index")
        return self._classes.MetadataIndex(
            self._is(fields.get("fqn"), str, "the name in an index"),
            None if offset is None else self._size(offset),
            None if index is None else self._is(index, int, "the number in an index"),
        )

    def _storage(self, record: Any) -> _StorageInfo:
        fields = self._fields(record, _Storage, "_StorageInfo")
        path = self._is(fields.get("relative_path"), str, "the file of an item")
        offset = self._natural(fields.get("offset"), "the offset of an item")
        length = self._natural(fields.get("length"), "the length of an item")
        if path not in self._within:
            self._check_within(path)
        descriptors = fields.get("transform_descriptors")
        names = None if descriptors is None else self._transforms(descriptors)
        return self._storage_info(path, offset, length, names)

    def _transforms(self, value: Any) -> list[str]:
        return [self._is(name, str, "a transform") for name in self._is(value, (list, tuple), "transforms")]

    def _check_within(self, path: str) -> None:
        if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\0" in path:
            self._refuse(f"an item lies in {_short(path)}, which is not within the checkpoint's directory")
        self._within.add(path)

    def _storage_meta(self, record: Any) -> StorageMeta:
        fields = self._fields(record, _StorageMeta, "StorageMeta")
        return self._classes.StorageMeta(
            self._plain(fields.get("checkpoint_id")),
            self._plain(fields.get("save_id")),
            self._plain(fields.get("load_id")),
            self._is(self._plain(fields.get("modules")) or [], list, "modules"),
        )

    def _size(self, value: Any) -> torch.Size:
        if type(value) is not _Size:
            self._refuse(f"{_short(value)} is not a size")
        # False == 0 == 0.0, but only what was found right is kept, and an equal one then is right, too.
        known = self._sizes.get(value)
        if known is None:
            known = self._sizes[value] = self._new_size(value)
        return known

    def _new_size(self, sizes: _Size) -> torch.Size:
        elements = 1
        for number in sizes:
            if type(number) is not int or number < 0:
                self._refuse(f"a dimension is {_short(number)}")
            elements *= number or 1
        if elements > _MAX_INT64:
            self._refuse(f"the size {list(sizes)} is too large")
        return self._torch.Size(sizes)

    def _plain(self, value: Any) -> Any:
        """What a planner stored: containers of plain values, as they are. Shared ones are built once, as chunks are."""
        if type(value) in _PLAIN:
            return value
        known = self._plains.get(id(value))
        if known is None:
            known = self._plains[id(value)] = self._new_plain(value)
        return known

    def _new_plain(self, value: Any) -> Any:
        if isinstance(value, _Size):
            return self._size(value)
        if isinstance(value, _Path):
            return Path(*(self._is(part, str, "a part of a path") for part in value.args))
        if isinstance(value, dict):
            return {self._plain(key): self._plain(item) for key, item in value.items()}
        if type(value) in _CONTAINERS:
            return type(value)(self._plain(item) for item in value)
        if isinstance(value, (type, _Fields, _Call)):
            self._refuse(f"the planner's data holds {_short(value)}")
        return value

    def _fields(self, record: Any, kind: type[_Fields], name: str) -> dict[str, Any]:
        if not isinstance(record, kind):
            self._refuse(f"there is {_short(record)} where a {name} is meant")
        state = record[-1] if record and record[-1] is not None else {}
        if not isinstance(state, dict):
            self._refuse(f"a {name} has no fields")
        return state

    def _natural(self, value: Any, what: str) -> int:
        if type(value) is not int or not 0 <= value <= _MAX_INT64:
            self._refuse(f"{what} is {_short(value)}")
        return value

    def _is(self, value: Any, kind: Any, what: str) -> Any:
        if not isinstance(value, kind) or isinstance(value, (bool, _Fields)):
            self._refuse(f"{what} is {_short(value)}")
        return value

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"the metadata is wrong: {what}", file=self._file, hint=_DAMAGED)


def _is_within(offsets: torch.Size, sizes: torch.Size, whole: torch.Size) -> bool:
    if not len(offsets) == len(sizes) == len(whole):
        return False
    return all(map(operator.le, map(operator.add, offsets, sizes), whole))


def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    # By the module's dict: its __getattr__ imports things.
    found = vars(torch).get(name)
    return found if isinstance(found, torch.dtype) else None


def _short(value: Any) -> str:
    """What stands in a file, for a message."""
    return repr(type(value).__name__.lstrip("_")) if isinstance(value, (_Fields, _Call)) else _SHORT.repr(value)
