"""The safetensors header: every check of the format in one place.

Layout: 8 bytes little-endian length N of the header, N bytes of JSON (an object of name -> {dtype, shape,
data_offsets}, and ``__metadata__``, strings to strings), then the data. The rules are those of the reference
implementation (https://github.com/huggingface/safetensors, 0.8): the tensors cover the data without hole or
overlap, the header is at most 100 MB. Stricter than it: a name stands once (there, the last one counts), and an
entry is an object with a string for its dtype.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import CheckpointError
from .dtypes import DTYPE_BITS, torch_dtype, torch_shape

if TYPE_CHECKING:
    import torch

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's bound; nothing longer is read into memory."""
_MAX_INT64 = 2**63 - 1
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring = 3, 10, 3, 200
_BLANK_BEFORE_COLON = re.compile(r'"\s+:')
_ENTRY_KEYS = 3
_NEGATIVE = re.compile(r"-\d")
_COPY_AGAIN = "the file is damaged or was not written completely: copy or download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The type, the shape and the location of one tensor.

    Attributes:
        name: as in the header.
        dtype: the safetensors name of the element type, e.g. "BF16".
        shape: as in the header.
        file: the path of the file that holds the tensor.
        offset: of the tensor's first byte, from the start of the file.
        nbytes: the tensor's length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    def as_torch(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """The element type and the shape of the torch tensor for this tensor.

        Raises:
            CheckpointError: torch has no such element type, or the shape is not a whole number of bytes.
        """
        try:
            return torch_dtype(self.dtype), torch_shape(self.dtype, self.shape)
        except CheckpointError as error:
            raise CheckpointError(f"{_short(self.name)}: {error.message}", file=self.file, hint=error.hint) from None


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the tensors in the order of their offsets, and the file's own metadata."""

    file: str
    file_bytes: int
    header_bytes: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, file_bytes: int, file: str) -> int:
    """The length of the JSON, checked against the file, from the file's first 8 bytes.

    Raises:
        CheckpointError: the file is too short for a header, or the length is more than the file or the format allows.
    """
    if file_bytes == 0:
        raise CheckpointError("the file is empty", file=file, hint=_COPY_AGAIN)
    if file_bytes < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{file_bytes} bytes are too short for a safetensors file", file=file, hint=_COPY_AGAIN)
    length: int = struct.unpack("<Q", prefix[:LENGTH_BYTES])[0]
    if length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES) and (other := _what_it_is(prefix)):
        what, remedy = other
        raise CheckpointError(what, file=file, hint=remedy)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header claims {length} bytes, more than the {MAX_HEADER_BYTES} that the format allows",
            file=file,
            hint="this is not a safetensors file, or it is damaged",
        )
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(
            f"the header claims {length} bytes, but the file ends after {file_bytes}", file=file, hint=_COPY_AGAIN
        )
    return length


def parse_header(text: bytes, file_bytes: int, file: str) -> Header:
    """Check the JSON ``text`` of a header against a file of ``file_bytes`` bytes.

    Raises:
        CheckpointError: the header breaks a rule of the format; the message says which rule, and for which tensor.
    """
    entries = _parse_json(text, file)
    metadata = _metadata(entries.pop("__metadata__", None), file)
    data_start = LENGTH_BYTES + len(text)
    tensors = sorted(
        (_tensor(name, entry, data_start, file) for name, entry in entries.items()),
        key=lambda info: (info.offset, info.nbytes),
    )
    _check_cover(tensors, data_start, file_bytes, file)
    return Header(file, file_bytes, data_start, tuple(tensors), metadata)


def _parse_json(text: bytes, file: str) -> dict[str, Any]:
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "the header is not UTF-8", file=file, offset=LENGTH_BYTES + error.start, hint=_COPY_AGAIN
        ) from None
    try:
        parsed = _parse_plain(decoded)
        if parsed is None:
            parsed = json.loads(
                decoded,
                object_pairs_hook=lambda pairs: _unique(pairs, file),
                parse_int=_integer,
                parse_float=_finite,
                parse_constant=_no_number,
            )
        if "\\u" in decoded:
            _check_text(parsed)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not valid JSON: {error}", file=file, hint=_COPY_AGAIN) from None
    if not isinstance(parsed, dict):
        raise CheckpointError("the header is not a JSON object", file=file, hint=_COPY_AGAIN)
    return parsed


def _parse_plain(text: str) -> dict[str, Any] | None:
    """The object of a header as programs usually write it, parsed by the decoder's C code alone (many times as fast).

    None where that code cannot tell whether a key stands twice or whether a number is an integer.
    """
    if "-" in text and _NEGATIVE.search(text):
        return None
    if len(text.split(None, 1)) > 1 and _BLANK_BEFORE_COLON.search(text):
        return None
    parsed = json.loads(text, parse_float=_finite, parse_constant=_no_number)
    if not isinstance(parsed, dict):
        return None
    for name, entry in parsed.items():
        if not isinstance(entry, dict) or (len(entry) != _ENTRY_KEYS and name != "__metadata__"):
            return None
    # From here on, a colon follows its key without a blank. A quote within a string has a backslash before it, and a
    # quote that ends a key has none, as long as no string ends in a backslash. So if there are as many `":` as keys,
    # the decoder dropped no key that stood twice, and no object is nested deeper.
    if '\\\\"' in text:
        return None
    keys = text.count('":') - text.count('\\":')
    return parsed if keys == len(parsed) + sum(map(len, parsed.values())) else None


def _unique(pairs: list[tuple[str, Any]], file: str) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError(f"the header has {_short(twice)} twice", file=file)
    return unique


def _integer(digits: str) -> int | float:
    # The reference implementation takes what no 64-bit integer can be, -0 included, for a float; a size is no float.
    return int(digits) if len(digits) <= 20 and not digits.startswith("-") else _finite(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is out of range")
    return number


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _check_text(parsed: Any) -> None:
    """Refuse escapes of half a character (lone surrogates), which Python's decoder accepts."""
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string has half of a surrogate pair") from None


def _metadata(value: Any, file: str) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"__metadata__ is not an object of strings: {_short(value)}", file=file)
    for key, text in value.items():
        if not isinstance(text, str):
            raise CheckpointError(f"{_short(key)} in __metadata__ is not a string: {_short(text)}", file=file)
    return value


def _tensor(name: str, entry: Any, data_start: int, file: str) -> TensorInfo:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError):
        raise _bad_entry(name, entry, file) from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{_short(name)} has the unknown dtype {_short(dtype)}", file=file, hint=f"known: {', '.join(DTYPE_BITS)}"
        )
    if not _naturals(shape):
        raise CheckpointError(f"the shape of {_short(name)} is not a list of sizes: {_short(shape)}", file=file)
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"the data_offsets of {_short(name)} are not [begin, end]: {_short(offsets)}", file=file)
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"the data_offsets of {_short(name)} end before they begin: {offsets}", file=file)
    nbytes = _expected_bytes(name, dtype, shape, file)
    if end - begin != nbytes:
        raise CheckpointError(
            f"{_short(name)} is {dtype} {_short(shape)}, which takes {nbytes} bytes, "
            f"but its data_offsets span {end - begin}",
            file=file,
            offset=data_start + begin,
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _bad_entry(name: str, entry: Any, file: str) -> CheckpointError:
    """The error for an entry that is not an object with the three fields of a tensor."""
    if not isinstance(entry, dict):
        return CheckpointError(f"the entry of {_short(name)} is not an object: {_short(entry)}", file=file)
    missing = [field for field in ("dtype", "shape", "data_offsets") if field not in entry]
    return CheckpointError(f"the entry of {_short(name)} has no {' and no '.join(missing)}", file=file)


def _expected_bytes(name: str, dtype: str, shape: list[int], file: str) -> int:
    # torch's strides are int64, also where a dimension is zero.
    elements = math.prod(shape)
    if (not elements or elements > _MAX_INT64) and math.prod(size or 1 for size in shape[1:]) > _MAX_INT64:
        raise CheckpointError(f"the shape of {_short(name)} is too large: {_short(shape)}", file=file)
    bits = elements * DTYPE_BITS[dtype]
    if bits % 8:
        raise CheckpointError(
            f"{_short(name)} is {dtype} {_short(shape)}, which is not a whole number of bytes", file=file
        )
    return bits // 8


def _check_cover(tensors: list[TensorInfo], data_start: int, file_bytes: int, file: str) -> None:
    expected = data_start
    before: TensorInfo | None = None
    for info in tensors:
        if info.offset != expected:
            what = "overlaps" if info.offset < expected else "leaves a hole after"
            raise CheckpointError(
                f"{_short(info.name)} {what} {'the header' if before is None else _short(before.name)}",
                file=file,
                offset=info.offset,
            )
        expected, before = info.offset + info.nbytes, info
    if expected > file_bytes:
        raise CheckpointError(
            f"the data is cut short: the header describes {expected} bytes, the file has {file_bytes}",
            file=file,
            hint=_COPY_AGAIN,
        )
    if expected < file_bytes:
        raise CheckpointError(
            f"{file_bytes - expected} bytes after the last tensor belong to none", file=file, offset=expected
        )


def _naturals(value: Any) -> bool:
    # bool is an int to Python, but `true` is no size.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_INT64 for item in value)


def _short(value: Any) -> str:
    """The text of a header's value for a message. A value can have megabytes, and be nested deeper than str() goes."""
    return _SHORT.repr(value)


def _what_it_is(prefix: bytes) -> tuple[str, str] | None:
    """What a file that is not in the safetensors format probably is, and what to do; None: unknown."""
    if prefix.startswith(b"version "):
        return "this is a git-lfs pointer, not the file itself", "run `git lfs pull`"
    if prefix.startswith(b"PK\3\4"):
        return "this is a zip file, perhaps a .pt checkpoint", "convert it to safetensors"
    if prefix.startswith(b"GGUF"):
        return "this is a GGUF file, not a safetensors file", "give the model's safetensors files"
    text = prefix.lstrip()
    # The length of a valid header has zero bytes in it; text has none.
    if 0 in prefix[:LENGTH_BYTES] or not text.startswith((b"<", b"{")):
        return None
    if text.startswith(b"{"):
        return (
            "this is JSON, as a config.json or a server's error is, not weights",
            "give the model's directory, or download the file again",
        )
    if text[:LENGTH_BYTES].lower().startswith((b"<!doctyp", b"<html")):
        return "this is an HTML page, perhaps the error page of a download", "download it again"
    return "this is XML or another text, perhaps the error of a download", "download it again"
