"""``.metadata``: what checkpoints need is read, and nothing else of a pickle is ever run."""

import builtins
import os
import pickle
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from engine_loader import CheckpointError
from engine_loader.formats import dcp_metadata
from engine_loader.formats.dcp_metadata import parse_metadata
from engine_loader.formats.pickle_memo import check_memo

from .states import load, stock_save, training_state


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def metadata(planner_data: Any = None, storage_data: Any = None, chunks: Any = None, **fields: Any) -> Metadata:
    if chunks is None:
        chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))]
    tensors = {"a": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([2, 3]), chunks)}
    if storage_data is None:
        storage_data = {MetadataIndex("a", [0, 0]): _StorageInfo("__0_0.distcp", 0, 1000)}
    return Metadata(tensors, planner_data, storage_data, StorageMeta(PosixPath("/x"), "s", "l"), **fields)


def test_a_training_s_metadata_is_what_pickle_makes_of_it(tmp_path):
    stock_save(training_state(), tmp_path / "c")
    content = (tmp_path / "c" / ".metadata").read_bytes()
    parsed, stock = parse_metadata(content, "f"), pickle.loads(content)
    assert parsed == stock
    assert list(parsed.storage_data) == list(stock.storage_data)
    assert [index.index for index in parsed.storage_data] == [index.index for index in stock.storage_data]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(protocol):
    stock = metadata({"a": ("list", 0, "a")}, version="1.0.0")
    assert parse_metadata(pickle.dumps(stock, protocol), "f") == stock


HOSTILE = {
    "system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(builtins.eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Calls(builtins.exec, f"open({str(mark)!r}, 'w')"),
    "getattr": lambda mark: Calls(builtins.getattr, Calls(os.open, str(mark), os.O_CREAT), "x"),
    "open": lambda mark: Calls(builtins.open, str(mark), "w"),
    "mkdir": lambda mark: Calls(os.mkdir, str(mark)),
    "touch": lambda mark: Calls(Path.touch, mark),
    "torch.load": lambda mark: Calls(torch.load, str(mark)),
    "torch._utils": lambda mark: Calls(torch._utils._rebuild_tensor_v2, Calls(os.mkdir, str(mark)), 0, (), ()),
    "torch.jit": lambda mark: Calls(torch.jit.load, str(mark)),
    "partial": lambda mark: Calls(__import__("functools").partial, os.mkdir, str(mark)),
    "import": lambda mark: Calls(__import__("importlib").import_module, "antigravity"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["top", "planner", "storage", "chunks", "key"])
def test_a_hostile_pickle_runs_nothing(tmp_path, name, place):
    mark = tmp_path / "was-run"
    hostile = HOSTILE[name](mark)
    found = {
        "top": lambda: hostile,
        "planner": lambda: metadata({"a": [hostile]}),
        "storage": lambda: metadata(storage_data={MetadataIndex("a"): hostile}),
        "chunks": lambda: metadata(chunks=[hostile]),
        "key": lambda: metadata(storage_data={hostile: 1}),
    }[place]()
    with pytest.raises(CheckpointError, match="no checkpoint needs; nothing of it was run"):
        parse_metadata(pickle.dumps(found), "f")
    assert not mark.exists()


def test_the_refused_name_is_told():
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        parse_metadata(pickle.dumps(Calls(os.system, "true")), "f")


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x0fSize.__init__\x93.",
        b"\x80\x04\x8c\x2ctorch.distributed.checkpoint.metadata\x8c\x08Metadata\x93.",
        b"(i__builtin__\neval\n.",
        b"\x82\x01.",
        b"Pid\n.",
        b"",
        b".",
        b"\x80\x04K\x01.",
        b"\x80\x04]\x94h\x00a.",
        b"not a pickle",
    ],
)
def test_what_is_no_metadata_is_one_clear_error(content):
    with pytest.raises(CheckpointError, match=r"^f: the metadata"):
        parse_metadata(content, "f")


def test_no_state_of_the_classes_themselves_is_set():
    # MetadataIndex, then BUILD with (None, {"fqn": "poisoned"}) on the class itself.
    name = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    with pytest.raises(CheckpointError):
        parse_metadata(b"\x80\x02" + name + b"N}X\x03\x00\x00\x00fqnX\x01\x00\x00\x00xs\x86b.", "f")
    assert not hasattr(MetadataIndex, "fqn")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: metadata(chunks=[ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([2, 3]))]), "not within"),
        (lambda: metadata(chunks=[ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))]), "not within"),
        (lambda: metadata(storage_data={MetadataIndex("a"): _StorageInfo("../x", 0, 1)}), "not within the checkpoint"),
        (lambda: metadata(storage_data={MetadataIndex("a"): _StorageInfo("/etc/x", 0, 1)}), "not within the checkp"),
        (lambda: metadata(storage_data={MetadataIndex("a"): _StorageInfo("x", -1, 1)}), "offset of an item is -1"),
        (lambda: metadata(storage_data={MetadataIndex("a"): _StorageInfo("x", 0, True)}), "length of an item is True"),
        (lambda: metadata(storage_data={"a": _StorageInfo("x", 0, 1)}), "'str'|'a' where a MetadataIndex"),
        (lambda: metadata(storage_data=[1]), r"storage_data is \[1\]"),
        (lambda: metadata(planner_data=Metadata({})), "the planner's data holds 'Metadata'"),
        (lambda: {"a": 1}, "where a Metadata is expected"),
    ],
)
def test_what_cannot_be_is_told(wrong, told):
    with pytest.raises(CheckpointError, match=told):
        parse_metadata(pickle.dumps(wrong()), "f")


def test_shared_parts_ask_for_no_more_work_than_there_are():
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]  # 2**60 lists, written out
    assert len(parse_metadata(pickle.dumps(metadata({"a": nested})), "f").planner_data["a"]) == 2


@pytest.mark.parametrize(
    "content", [b"\x80\x02]r\xff\xff\xff\x7f.", b"]p2147483647\n.", b"\x80\x04X\x01\x00\x00\x00ar    ."]
)
def test_a_few_bytes_do_not_ask_for_all_memory(content):
    with pytest.raises(CheckpointError, match=r"it gives an object the number \d+, but has only"):
        parse_metadata(content, "f")


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_writes_is_no_reason_to_refuse_it(protocol):
    values = [1, -5, 300, 70_000, 2**40, 2**3000, 1.5, "r", "ü" * 300, b"r" * 300, bytearray(9), {1: (2, 3, 4, 5)}, {6}]
    values += [
        None,
        True,
        frozenset({7}),
        [[number] for number in range(400)],
        MetadataIndex("a", [0]),
        torch.Size([2]),
    ]
    check_memo(pickle.dumps([values, values], protocol))


def test_its_size_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(dcp_metadata, "MAX_METADATA_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than the 100 that are read"):
        parse_metadata(bytes(101), "f")


def test_loading_a_hostile_checkpoint_runs_nothing(tmp_path):
    stock_save({"a": torch.zeros(3)}, tmp_path / "c")
    mark = tmp_path / "was-run"
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(metadata(Calls(os.mkdir, str(mark)))))
    with pytest.raises(CheckpointException, match=r"posix\.mkdir"):
        load({"a": torch.zeros(3)}, tmp_path / "c")
    assert not mark.exists()


def test_an_item_that_runs_code_is_not_handed_to_the_planner(tmp_path):
    mark = tmp_path / "was-run"
    stock_save({"a": Calls(os.mkdir, str(mark))}, tmp_path / "c")
    with pytest.raises(CheckpointException, match=r"'a' is not a tensor, and torch.load\(weights_only=True\) refuses"):
        load({"a": None}, tmp_path / "c")
    assert not mark.exists()
    torch_dcp.load({"a": None}, storage_reader=torch_dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert mark.exists(), "the stock reader runs it, so the checkpoint was hostile"
    mark.rmdir()
    load({"a": None}, tmp_path / "c", trust_pickles=True)
    assert mark.exists()
