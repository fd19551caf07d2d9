"""Reads the pickle of a DCP ``.metadata`` file into records, without running what the pickle names.

A pickle can call whatever it names. Here only the names that DCP itself writes are known, and each of them becomes a
record that keeps what the pickle says about the object. ``dcp_metadata`` builds torch's classes from checked records.
Names are those of torch 2.13 (``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``), and the older ones
that torch 2.13 still reads.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .pickle_guard import guarded

if TYPE_CHECKING:
    import torch

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 8, 3, 200, 100


class FieldsRecord(list[Any]):
    """What a pickle says about an object of a known class with fields: the states that it sets, of which the last one
    counts. A list, because a checkpoint has very many of them, and Python code runs neither to make nor to fill one."""

    __slots__ = ()

    # The BUILD opcode calls __setstate__: with this one, no pickle sets attributes of these classes or their objects.
    __setstate__ = list.append

    def __init__(self, *args: Any) -> None:
        raise pickle.UnpicklingError("it calls a class that DCP does not call")

    # Records are keys of dicts, and the text of a list can be much longer than the pickle.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]
    __repr__ = object.__repr__


class MetadataRecord(FieldsRecord):
    __slots__ = ()


class IndexRecord(FieldsRecord):
    __slots__ = ()


class ChunkRecord(FieldsRecord):
    __slots__ = ()


class TensorRecord(FieldsRecord):
    __slots__ = ()


class PropertiesRecord(FieldsRecord):
    __slots__ = ()


class BytesRecord(FieldsRecord):
    __slots__ = ()


class StorageMetaRecord(FieldsRecord):
    __slots__ = ()


class StorageInfoRecord(FieldsRecord):
    __slots__ = ()


class TupleRecord(FieldsRecord):
    """The elements of a tuple of the pickle; unlike a tuple, it is hashed by its identity."""

    __slots__ = ()
    __init__ = list.__init__


class FrozensetRecord(TupleRecord):
    """The elements of a frozenset of the pickle."""

    __slots__ = ()


class CallRecord:
    """What a pickle says about an object that is made by a call: the arguments of the call."""

    __slots__ = ("args",)

    args: tuple[Any, ...]

    def __new__(cls, *args: Any) -> CallRecord:
        call = super().__new__(cls)
        call.args = args
        return call

    # No pickle sets attributes of these classes or their objects.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets a state where DCP sets none")


class MemoryFormatRecord(CallRecord):
    __slots__ = ()


class LayoutRecord(CallRecord):
    __slots__ = ()


class PathRecord(CallRecord):
    __slots__ = ()


class SizeRecord(tuple[Any, ...]):
    """What a pickle says about a ``torch.Size``. A checkpoint has very many; no Python code runs to make a tuple."""

    __slots__ = ()

    # No pickle sets attributes of this class or its objects.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets a state where DCP sets none")


_DCP = "torch.distributed.checkpoint.metadata"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # the module of two of the classes until torch 2.2
_KNOWN: dict[tuple[str, str], type] = {
    (_DCP, "Metadata"): MetadataRecord,
    (_DCP, "MetadataIndex"): IndexRecord,
    (_DCP, "ChunkStorageMetadata"): ChunkRecord,
    (_DCP, "TensorStorageMetadata"): TensorRecord,
    (_DCP, "TensorProperties"): PropertiesRecord,
    (_OLD, "TensorProperties"): PropertiesRecord,
    (_DCP, "BytesStorageMetadata"): BytesRecord,
    (_DCP, "StorageMeta"): StorageMetaRecord,
    (_DCP, "_MEM_FORMAT_ENCODING"): MemoryFormatRecord,
    (_OLD, "MEM_FORMAT_ENCODING"): MemoryFormatRecord,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfoRecord,
    ("nemo_automodel.components.checkpoint._backports.filesystem", "_StorageInfo"): StorageInfoRecord,
    ("torch", "Size"): SizeRecord,
    ("torch.serialization", "_get_layout"): LayoutRecord,
    ("pathlib", "PosixPath"): PathRecord,
    ("pathlib", "PurePosixPath"): PathRecord,
    ("pathlib._local", "PosixPath"): PathRecord,  # Python 3.13
}


_SCALARS = frozenset({int, bool, type(None)})
_MOST_ITEMS = 1024
"""Of a text or sequence in a call: the call copies it, and the same one can be given to very many calls."""


def _is_short(value: Any) -> bool:
    """True for a short text, and for a short sequence of integers."""
    if isinstance(value, str):
        return len(value) <= _MOST_ITEMS
    sequence = isinstance(value, (list, tuple)) and len(value) <= _MOST_ITEMS
    return sequence and all(type(item) in _SCALARS for item in value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, file: str) -> None:
        super().__init__(io.BytesIO(content))
        self._file = file

    def persistent_load(self, pid: tuple[Any, ...]) -> Any:
        """What stands for a tuple or frozenset, or the checked arguments of a call; see ``pickle_guard``."""
        if len(pid) == 1:
            return (FrozensetRecord if type(pid[0]) is frozenset else TupleRecord)(pid[0])
        for value in pid[0]:
            if type(value) not in _SCALARS and not _is_short(value):
                raise pickle.UnpicklingError("it calls something with a value that DCP does not give")
        return pid[0]

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        dtype = _torch_dtype(name) if module == "torch" else None
        if dtype is not None:
            return dtype
        raise CheckpointError(
            f"the metadata names {short(f'{module}.{name}')}, which no checkpoint needs; nothing of it was run",
            file=self._file,
            hint="do not load it with other readers unless you trust its author: they run what it names",
        )


def read_records(content: bytes, file: str) -> Any:
    """The object that a ``.metadata`` file holds, of records, plain values, containers and torch dtypes.

    Args:
        content: of the file.
        file: its path, for messages.

    Raises:
        CheckpointError: it names something that no checkpoint needs; nothing was run.
        Exception: of any kind, where the pickle is damaged (see the documentation of ``pickle``).
    """
    return _Unpickler(guarded(content), file).load()


def short(value: Any) -> str:
    """The text of a value of the file for a message, cut to a length that fits a line of a log."""
    if isinstance(value, (FieldsRecord, CallRecord)):
        return repr(type(value).__name__.removesuffix("Record"))
    return _SHORT.repr(value)


def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    # By the module's dict: its __getattr__ imports things.
    found = vars(torch).get(name)
    return found if isinstance(found, torch.dtype) else None
