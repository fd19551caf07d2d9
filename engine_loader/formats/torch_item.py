"""Finds the bytes of one tensor in an item that ``torch.save`` wrote, without making the objects of its pickle.

An item is a zip archive whose records are not compressed: ``data.pkl`` has element type, shape and strides, ``data/0``
has the bytes. The first and the last bytes of the item are enough to find them. Other items (several storages,
compression, big-endian, subclasses) are left to ``torch.load``. Facts are those of torch 2.13
(``torch/serialization.py`` and ``torch/_utils.py``).
"""

from __future__ import annotations

import io
import pickle
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from .pickle_memo import check_memo

ENDS_BYTES = 2 << 10
"""Bytes that are needed of the beginning and of the end of an item; torch 2.13 takes 768 and 720 bytes."""
ZIP_MAGIC = b"PK\x03\x04"
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
# (signature, flags, method, packed size, size, lengths of name, extra field and comment, offset)
_ENTRY = struct.Struct("<4s4x2H8x2L3H8xL")
_CHECKSUM_AT, _CHECKSUM_BYTES = 16, 4  # in an entry
# (signature, method, lengths of name and extra field)
_LOCAL = struct.Struct("<4s4xH16x2H")
_FULL = 0xFFFFFFFF
_NEEDED = frozenset({"data.pkl", "byteorder"})
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1}
_ITEM_BYTES |= {"uint8": 1, "bool": 1, "complex64": 8, "complex128": 16, "uint16": 2, "uint32": 4, "uint64": 8}
_ITEM_BYTES |= dict.fromkeys(
    ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"), 1
)


class TensorLayout(NamedTuple):
    """The type and the location of a tensor's elements.

    Attributes:
        dtype: the name of the torch dtype, e.g. "bfloat16".
        shape: the sizes of the tensor.
        strides: in elements.
        offset: of the first element, in bytes from the start of the item.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def item_layout(head: bytes, tail: bytes, length: int) -> TensorLayout | None:
    """The layout of the tensor in an item, or None for an item that only ``torch.load`` can read.

    Args:
        head: the item's first ``ENDS_BYTES`` bytes, or all bytes of a shorter item.
        tail: the item's last ``ENDS_BYTES`` bytes, or all bytes of a shorter item.
        length: bytes of the item.
    """
    alike = _seen.get(length)
    if alike is not None and alike.is_like(head, tail):
        return alike.layout
    try:
        layout, alike = _layout(head, tail, length)
    # An item that raises here (IndexError, UnpicklingError, struct.error, …) is left to torch.load and its errors.
    except Exception:
        return None
    if alike is not None:
        if len(_seen) >= _MOST_SEEN:
            _seen.clear()
        _seen[length] = alike
    return layout


class _Alike(NamedTuple):
    """The bytes that decide the layout of an item. The layers of a model have equal ones: the layout of a further item
    of the same length is found by comparing these bytes.

    Attributes:
        layout: of the item.
        head: the bytes before the tensor's bytes.
        tail_bytes: the length of the item's end that was looked at.
        tail: the end from the zip's directory on, without the directory's checksums: (begin, end, bytes) of each run.
    """

    layout: TensorLayout
    head: bytes
    tail_bytes: int
    tail: tuple[tuple[int, int, bytes], ...]

    def is_like(self, head: bytes, tail: bytes) -> bool:
        """True if an item of the same length, with these ends, has the same layout."""
        if len(tail) != self.tail_bytes or not head.startswith(self.head):
            return False
        return all(tail[begin:end] == known for begin, end, known in self.tail)


_seen: dict[int, _Alike] = {}
_MOST_SEEN = 256


class _Pickled(NamedTuple):
    """The content of ``data.pkl``: the name of the record with the bytes, the tensor's layout in that record, and the
    bytes that the tensor needs of the record."""

    record: str
    layout: TensorLayout
    nbytes: int


def _layout(head: bytes, tail: bytes, length: int) -> tuple[TensorLayout | None, _Alike | None]:
    records, directory, checksums = _records(head, tail, length)
    pickle_at, nbytes = records.pop("data.pkl")
    content = head[pickle_at : pickle_at + nbytes]
    order_at, order_bytes = records.pop("byteorder", (0, None))
    if len(content) != nbytes or (order_bytes is not None and head[order_at : order_at + order_bytes] != b"little"):
        return None, None
    pickled = _pickled(content)
    ((name, (begin, nbytes)),) = records.items()
    if pickled is None or name != pickled.record or pickled.nbytes > nbytes:
        return None, None
    dtype, shape, strides, offset = pickled.layout
    layout = TensorLayout(dtype, shape, strides, begin + offset)
    # A comparison can replace this function if all records that were looked at come before the tensor's bytes, and the
    # tensor's bytes end after the head.
    if not max(pickle_at + len(content), order_at + (order_bytes or 0)) <= begin <= len(head) <= begin + nbytes:
        return layout, None
    begins = [directory, *(at + _CHECKSUM_BYTES for at in checksums)]
    tail_parts = tuple(
        (first, end, tail[first:end]) for first, end in zip(begins, [*checksums, len(tail)], strict=True)
    )
    return layout, _Alike(layout, head[:begin], len(tail), tail_parts)


@lru_cache(maxsize=256)  # the layers of a model have equal pickles
def _pickled(content: bytes) -> _Pickled | None:
    check_memo(content)
    tensor = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(tensor, _Tensor):
        return None
    item_bytes = _ITEM_BYTES[tensor.dtype]
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    elements = 0 if 0 in tensor.shape else tensor.first + reach + 1
    layout = TensorLayout(tensor.dtype, tensor.shape, tensor.strides, tensor.first * item_bytes)
    return _Pickled(f"data/{tensor.key}", layout, elements * item_bytes)


def _records(head: bytes, tail: bytes, length: int) -> tuple[dict[str, tuple[int, int]], int, list[int]]:
    """(records, directory, checksums) of a zip archive.

    records: (offset, length) in the item, by the name in the archive, of the needed records with a header in ``head``.
    directory: the offset in ``tail`` where the archive's directory begins.
    checksums: the offset in ``tail`` of the checksum of each entry of the directory.
    """
    skipped = length - len(tail)
    end = _END.unpack(tail[-_END.size :])
    if end[0] != b"PK\x05\x06" or end[-1]:
        raise ValueError("no end of a zip")
    count, where = end[4], end[6]
    big = tail.rfind(b"PK\x06\x06")
    if where == _FULL and big >= 0:
        fields = _END_64.unpack_from(tail, big)
        count, where = fields[7], fields[9]
    directory = entry = where - skipped
    if directory < 0:
        raise ValueError("the directory is longer than that of an item with one tensor")
    records = {}
    checksums = []
    for _ in range(count):
        signature, flags, method, packed, nbytes, name_bytes, extra_bytes, comment_bytes, at = _ENTRY.unpack_from(
            tail, entry
        )
        checksums.append(entry + _CHECKSUM_AT)
        name_at = entry + _ENTRY.size
        extra_at = name_at + name_bytes
        entry = extra_at + extra_bytes + comment_bytes
        name = tail[name_at:extra_at].decode().partition("/")[2]
        if name not in _NEEDED and not name.startswith("data/"):
            continue
        if _FULL in (packed, nbytes, at):
            packed, nbytes, at = _wide(tail[extra_at : extra_at + extra_bytes], nbytes, packed, at)
        if at + _LOCAL.size > len(head):
            continue  # records after the tensor's bytes are not needed
        local_signature, local_method, local_name_bytes, local_extra_bytes = _LOCAL.unpack_from(head, at)
        begin = at + _LOCAL.size + local_name_bytes + local_extra_bytes
        stored = signature == b"PK\x01\x02" and local_signature == ZIP_MAGIC and method == local_method == 0
        if not stored or packed != nbytes or flags & 1 or begin + nbytes > where:
            raise ValueError("not a stored record")
        records[name] = (begin, nbytes)
    return records, directory, checksums


def _wide(extra: bytes, nbytes: int, packed: int, at: int) -> tuple[int, int, int]:
    """(packed size, size, offset) of an entry; values that do not fit 32 bits come from the entry's 64-bit field."""
    numbers = [nbytes, packed, at]
    while _FULL in numbers and len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, 4))
            numbers = [next(wide) if number == _FULL else number for number in numbers]
            break
        extra = extra[4 + size :]
    return numbers[1], numbers[0], numbers[2]


@dataclass(frozen=True, slots=True)
class _Storage:
    """The storage that a persistent id describes; ``dtype`` is None for untyped bytes."""

    key: str
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Kind:
    """An element type that the pickle names; ``dtype`` is None for untyped bytes."""

    dtype: str | None


class _Tensor:
    """Stands in for ``torch._utils._rebuild_tensor_v2`` and ``_v3``, and keeps the arguments of the call."""

    __slots__ = ("dtype", "first", "key", "shape", "strides")

    def __init__(
        self, storage: _Storage, first: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any
    ) -> None:
        _, _, *rest = more  # requires_grad, hooks
        dtype = storage.dtype
        if dtype is None:
            kind = rest.pop(0)
            dtype = kind.dtype
        if rest or not all(type(number) is int and number >= 0 for number in (first, *size, *stride)):
            raise ValueError("not a plain tensor")  # conjugated, negated
        self.key, self.dtype, self.first, self.shape, self.strides = storage.key, dtype, first, size, stride

    # No pickle sets attributes of this class or its objects.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets a state where torch sets none")


class _Hooks:
    """Stands in for the OrderedDict of hooks, which is empty."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets a state where torch sets none")


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _Tensor,
    ("collections", "OrderedDict"): _Hooks,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Kind(_STORAGES[name])
        if module == "torch" and name in _ITEM_BYTES:
            return _Kind(name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Kind(None)
        return _FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _, _ = pid
        if tag != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str):
            raise pickle.UnpicklingError("not a storage")
        return _Storage(key, kind.dtype)
