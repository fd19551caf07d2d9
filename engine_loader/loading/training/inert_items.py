"""Whether an item that is no tensor holds inert data only: tensors, plain values, numpy's arrays, dates, paths, deques.

``torch.load(weights_only=True)`` knows none of the latter, and trainings save them. Here the item's pickle is carried
out with stand-ins in the place of every class: nothing of numpy or of the standard library is made, and nothing is run.
What passes, pickle makes into data without running code of the checkpoint's author.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import torch

_RECORD = "data.pkl"
_PLAIN_DTYPE = re.compile(r"[<>|=]?(?:[?bB]|b1|[iuf]\d{1,2}|c\d{1,2}|[SUV]\d+|[mM]8)")
_SIZES = re.compile(r"\d+")
# By number in a registry that programs fill: no name to look at.
_NAMELESS = {"EXT1", "EXT2", "EXT4"}


class NotInertError(Exception):
    """An item names what is not known to be inert; the message is the name, or what is wrong."""


def check_inert(content: bytes) -> None:
    """Check an item of ``torch.save``.

    Raises:
        NotInertError: it has other objects, or is damaged.
    """
    try:
        code = torch._C.PyTorchFileReader(io.BytesIO(content)).get_record(_RECORD)
        if _NAMELESS & {opcode.name for opcode, _, _ in pickletools.genops(code)}:
            raise NotInertError("an object by its number in copyreg")
        _Checking(io.BytesIO(code)).load()
    except NotInertError:
        raise
    except Exception as error:  # of damaged or malicious bytes, pickle raises what it comes across
        raise NotInertError(f"{type(error).__name__}: {error}") from None


class _Checking(pickle.Unpickler):
    """Puts a stand-in in the place of everything that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__builtin__":  # as protocol 2 has it
            module, name = "builtins", "range" if name == "xrange" else name
        stand_in = _STAND_INS.get(f"{module}.{name}")
        if stand_in is None and (module == "torch" and name.endswith("Storage")):
            stand_in = _Value
        if stand_in is None:
            raise NotInertError(f"{module}.{name}")
        return stand_in

    def persistent_load(self, pid: Any) -> Any:
        return _Value()


class _Value:
    """What is made of its arguments alone. Without a state: there is nothing that pickle could set."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass


class _Dictionary(dict[Any, Any]):
    """collections.OrderedDict; its attributes (torch's ``_metadata``) are plain, too."""

    def __setstate__(self, state: Any) -> None:
        _check(isinstance(state, dict), "the state of an OrderedDict")


class _Attributes:
    """argparse.Namespace: a dictionary of plain values."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        _check(isinstance(state, dict), "the state of a Namespace")


class _Dtype:
    """numpy.dtype of numbers, flags, text or times; no records and no Python objects, whose states numpy trusts."""

    def __init__(self, code: Any, *_: Any) -> None:
        _check(isinstance(code, str) and _PLAIN_DTYPE.fullmatch(code), f"a numpy.dtype {code!r}")
        digits = _SIZES.search(code)
        self.itemsize = int(digits[0]) * (4 if "U" in code else 1) if digits else 1

    def __setstate__(self, state: Any) -> None:
        _check(isinstance(state, tuple) and len(state) >= 8, "the state of a numpy.dtype")
        fields = [part for part in state[2:5] if part is not None]
        size = state[5]
        _check(not fields, "a numpy.dtype with fields")
        # -1: the size follows from the code. Text has its size here.
        _check(isinstance(size, int) and size in (-1, self.itemsize), "the size of a numpy.dtype")


class _Array:
    """numpy.ndarray: made empty, then given shape, type and bytes, which must fit each other."""

    def __setstate__(self, state: Any) -> None:
        _check(isinstance(state, tuple) and len(state) == 5, "the state of a numpy.ndarray")
        _, shape, dtype, _, content = state
        _check(
            isinstance(shape, tuple) and all(isinstance(size, int) and size >= 0 for size in shape),
            "the shape of a numpy.ndarray",
        )
        _check(
            isinstance(dtype, _Dtype)
            and isinstance(content, bytes)
            and len(content) == math.prod(shape) * dtype.itemsize,
            "the bytes of a numpy.ndarray",
        )


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    _check(kind is _Array and shape == (0,) and code in (b"b", "b"), "how a numpy.ndarray is made")
    return _Array()


def _scalar(dtype: Any, content: Any) -> _Value:
    _check(
        isinstance(dtype, _Dtype) and isinstance(content, bytes) and len(content) == dtype.itemsize, "a numpy scalar"
    )
    return _Value()


def _bytes_of(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, by which protocol 2 writes bytes."""
    _check(isinstance(text, str) and encoding == "latin1", "bytes in another encoding")
    return text.encode("latin1")  # type: ignore[no-any-return]


def _bytes(content: Any = b"", encoding: Any = "latin1") -> bytes:
    """bytes and bytearray of what is there; not of a number, which would be memory of that size."""
    return _bytes_of(content, encoding) if isinstance(content, str) else _plain_bytes(content)


def _plain_bytes(content: Any) -> bytes:
    _check(isinstance(content, bytes), "bytes that are not given")
    return content  # type: ignore[no-any-return]


def _list(items: Any = (), *_: Any) -> list[Any]:
    return list(items)


def _set(items: Any = ()) -> frozenset[int]:
    return frozenset(map(id, items))


def _check(fits: Any, what: str) -> None:
    if not fits:
        raise NotInertError(what)


_VALUES = (
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),  # Python 3.13
    *(f"builtins.{name}" for name in ("complex", "slice", "range")),
    "decimal.Decimal",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
_STAND_INS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_VALUES, _Value),
    **{f"torch.{name}": _Value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **dict.fromkeys(("builtins.set", "builtins.frozenset"), _set),
    "_codecs.encode": _bytes_of,
    "argparse.Namespace": _Attributes,
    **dict.fromkeys(("builtins.bytes", "builtins.bytearray"), _bytes),
    "collections.OrderedDict": _Dictionary,
    "collections.deque": _list,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}
"""Name in a pickle -> what is called in its place. Of a dtype without a call (REDUCE), only the name is needed."""
