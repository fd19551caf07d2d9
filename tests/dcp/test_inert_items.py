"""Items that are no tensors: what trainings save of plain data is loaded as it was, and what could run code is not."""

import argparse
import collections
import datetime
import decimal
import io
import os
import pickle
import random
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from engine_loader.dcp import FileSystemReader, FileSystemWriter
from engine_loader.loading.training.inert_items import NotInertError, check_inert

PLAIN: dict[str, Any] = {
    "array": np.arange(6.0).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    "foreign": np.array([1, 2], ">i4"),
    "text": np.array(["ab", "c"]),
    "times": np.array(["2020-01-01"], "M8[ns]"),
    "nothing": np.zeros((0, 3)),
    "scalar": np.float32(3.5),
    "flag": np.bool_(True),
    "rng": np.random.default_rng(0).bit_generator.state,
    "legacy": np.random.RandomState(0).get_state(),
    "python": random.Random(0).getstate(),
    "when": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
    "took": datetime.timedelta(seconds=1.5),
    "path": Path("/data/train"),
    "pure": PurePosixPath("a/b"),
    "losses": collections.deque([0.5, np.float64(0.25)], maxlen=10),
    "options": argparse.Namespace(lr=1e-3, out=Path("x"), layers=[1, 2]),
    "kinds": {"set": {1, 2}, "bytes": b"\0\xff", "slice": slice(1, 2), "array": bytearray(b"ab"), "complex": 1j},
    "money": decimal.Decimal("1.50"),
    "mixed": {"tensor": torch.arange(3), "numpy": np.arange(3)},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list | collections.deque):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | torch.Tensor):
        return type(a) is type(b) and _native(a.dtype) == b.dtype and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and bool(a == b)


def _native(dtype: Any) -> Any:
    """numpy turns what it unpickles into this machine's byte order."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def test_plain_data_comes_back_as_it_was(tmp_path: Path) -> None:
    torch_dcp.save(dict(PLAIN), storage_writer=FileSystemWriter(tmp_path / "c"), no_dist=True)
    loaded: dict[str, Any] = {}
    reader = FileSystemReader(tmp_path / "c")
    _load_state_dict(loaded, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert loaded.keys() == PLAIN.keys()
    assert [name for name, value in PLAIN.items() if not same(value, loaded[name])] == []


@pytest.mark.parametrize("value", [*PLAIN.values(), collections.OrderedDict(a=np.int64(1))], ids=[*PLAIN, "ordered"])
def test_each_kind_passes_whole(value: Any) -> None:
    check_inert(item(value))


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


class Mine:
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Runs(), "posix.system"),
        ([np.arange(3), Runs()], "posix.system"),
        (collections.deque([Mine()]), "Mine"),
        (os.getcwd, "posix.getcwd"),
        (collections.defaultdict(list), "collections.defaultdict"),
        (np.array([{}, 1], object), r"a numpy.dtype 'O8'"),
        (np.zeros(2, [("a", "i4")]), "a numpy.dtype with fields"),
        (np.random.default_rng(0), "numpy.random._pickle.__generator_ctor"),
    ],
)
def test_anything_else_is_refused_by_its_name(value: Any, named: str) -> None:
    with pytest.raises(NotInertError, match=named):
        check_inert(item(value))


def test_the_message_names_the_class_and_the_remedy(tmp_path: Path) -> None:
    torch_dcp.save({"a": Mine()}, storage_writer=FileSystemWriter(tmp_path / "c"), no_dist=True)
    with pytest.raises(CheckpointException, match=r"not known to be plain data: \S+Mine \(nothing was run.*trust_pick"):
        torch_dcp.load({"a": None}, storage_reader=FileSystemReader(tmp_path / "c"), no_dist=True)


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
BYTES = b"I00\nc_codecs\nencode\n(Vab\nVlatin1\ntRtb."
DTYPE = b"cnumpy\ndtype\n(V%s\nI00\nI01\ntR(I3\nV<\nNNNI%d\nI%d\nI0\ntb"


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        (
            ARRAY + b"(I1000000\nt" + DTYPE % (b"f8", -1, -1) + b"I00\nc_codecs\nencode\n(Vab\nVlatin1\ntRtb.",
            "the bytes",
        ),
        (ARRAY + b"(I-1\nt" + DTYPE % (b"f8", -1, -1) + BYTES, "the shape"),
        (DTYPE % (b"f8", 100000, 8) + b".", "the size of a numpy.dtype"),
        (DTYPE % (b"f8,i4", -1, -1) + b".", "a numpy.dtype 'f8,i4'"),
        (b"c__builtin__\nbytearray\n(I1000000000000\ntR.", "bytes that are not given"),
        (b"cdatetime\ndate\n(tRN}b.", "AttributeError|UnpicklingError|TypeError|IndexError"),
        (b"cnumpy\nndarray\n(I5\ntR.", "TypeError"),
        (b"\x80\x02\x82\x01.", "copyreg|ValueError"),
        (b"garbage", "UnpicklingError|ValueError"),
    ],
)
def test_what_was_made_by_hand_is_refused(code: bytes, wrong: str) -> None:
    content = io.BytesIO(item(1))
    rewritten = io.BytesIO()
    with zipfile.ZipFile(content) as archive, zipfile.ZipFile(rewritten, "w") as target:
        for entry in archive.namelist():
            target.writestr(entry, code if entry.endswith("/data.pkl") else archive.read(entry))
    with pytest.raises(NotInertError, match=wrong):
        check_inert(rewritten.getvalue())


def test_damaged_items_are_refused() -> None:
    content = item(np.arange(10))
    for cut in (0, 10, len(content) // 2):
        with pytest.raises(NotInertError):
            check_inert(content[:cut])
    with pytest.raises(NotInertError):
        check_inert(pickle.dumps(1))


def item(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
