"""Checkpoints in S3: what is saved is loaded, bit for bit, by this package, by torch and by s3torchconnector."""

import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3torchconnector.dcp as theirs
import torch
import torch.distributed.checkpoint as torch_dcp
from s3torchconnector import S3ClientConfig as TheirConfig
from s3torchconnector import S3ReaderConstructor
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from engine_loader import CheckpointError, dcp
from engine_loader.dcp import S3ClientConfig, S3StorageReader, S3StorageWriter, SerializationFormat
from tests.support.fault_server import FaultServer
from tests.support.object_stores import ON_RADOSGW
from tests.support.s3_server import S3Server

from ..states import blank, same, stock_save, training_state
from .buckets import REGION, download, keys, load, save, their_load, their_save, unfinished_uploads, upload

STRATEGIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "none": ({}, ["__0_0.distcp"]),
    "default": ({"prefix_strategy": dcp.DefaultPrefixStrategy()}, ["__0_0.distcp"]),
    "binary": ({"prefix_strategy": dcp.BinaryPrefixStrategy()}, ["0000000000/__0_0.distcp"]),
    "hex": ({"prefix_strategy": dcp.HexPrefixStrategy(5, 1, 300)}, ["000/epoch_5/__0_0.distcp"]),
    "round-robin": ({"prefix_strategy": dcp.RoundRobinPrefixStrategy(["x/y", "z"])}, ["x/y/__0_0.distcp"]),
    "threads": (
        {"prefix_strategy": dcp.BinaryPrefixStrategy(), "thread_count": 2},
        ["0000000000/__0_0.distcp", "0000000000/__0_1.distcp"],
    ),
}


@pytest.fixture
def url(request: pytest.FixtureRequest, on_s3: S3Server) -> Iterator[str]:
    on_s3.make_bucket("checkpoints")
    name = "".join(char if char.isalnum() else "-" for char in request.node.name)
    yield f"s3://checkpoints/runs/{name}"
    assert b"<UploadId>" not in unfinished_uploads(on_s3, "checkpoints")


@pytest.mark.parametrize("options", [{}, {"thread_count": 3}, {"single_file_per_rank": False, "thread_count": 2}])
@pytest.mark.parametrize("serialization", SerializationFormat)
def test_what_is_saved_is_loaded(url: str, options: dict[str, Any], serialization: SerializationFormat) -> None:
    state = training_state()
    del state["kinds"]["torch.complex64"]  # safetensors has no name for it
    save(state, url, serialization_format=serialization, **options)
    assert same(state, load(blank(state), url))


def test_compressed_items(url: str) -> None:
    state = training_state()
    save(state, url, _extensions=[ZStandard()])
    assert same(state, load(blank(state), url))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_by_every_prefix_strategy_all_readers_read_it(url: str, strategy: str, tmp_path: Path) -> None:
    options, names = STRATEGIES[strategy]
    state = training_state()
    save(state, url, **options)
    assert keys(url) == [".metadata", *names]
    assert same(state, load(blank(state), url))
    assert same(state, their_load(blank(state), url))
    local = blank(state)
    reader = torch_dcp.FileSystemReader(download(url, tmp_path))
    torch_dcp.load(local, storage_reader=reader, no_dist=True)
    assert same(state, local)


@pytest.mark.skipif(ON_RADOSGW, reason="s3torchconnector misses an ETag in what Ceph 16 answers, and writes nothing")
@pytest.mark.parametrize(
    "options",
    [{}, {"thread_count": 2}, {"single_file_per_rank": False}, {"prefix_strategy": theirs.HexPrefixStrategy(3)}],
    ids=["one", "threads", "many", "hex"],
)
def test_what_s3torchconnector_saved_is_loaded_and_replaced(url: str, options: dict[str, Any]) -> None:
    state, other = training_state(), {"a": torch.ones(5)}
    their_save(state, url, **options)
    assert same(state, load(blank(state), url))
    save(other, url)
    assert same(other, load(blank(other), url))
    assert len(keys(url)) == 2


def test_a_program_written_for_s3torchconnector(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its own config, its ways of reading, and arguments by their places there."""
    caplog.set_level("DEBUG", "engine_loader.dcp.s3_file_system")
    config = TheirConfig(part_size=1 << 20, max_attempts=0, force_path_style=True)
    writer = S3StorageWriter(REGION, url, config, dcp.HexPrefixStrategy(prefix_count=4), 2)
    assert writer.thread_count == 2
    state = {"a": torch.arange(1000.0), "b": torch.ones(5, 7)}
    torch_dcp.save(state, storage_writer=writer, no_dist=True)
    for constructor in (
        S3ReaderConstructor.sequential(),
        S3ReaderConstructor.range_based(buffer_size=1 << 20),
        S3ReaderConstructor.dcp_optimized(max_gap_size=0),
    ):
        loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        reader = S3StorageReader(REGION, url, config, constructor)
        torch_dcp.load(loaded, storage_reader=reader, no_dist=True)
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    passed_over = [line for line in caplog.messages if "is passed over" in line]
    assert [line.partition("(")[2].partition(")")[0] for line in passed_over] == [
        "SequentialS3Reader",
        "RangedS3Reader",
        "DCPOptimizedConstructor",
    ]


def test_what_torch_saved_is_loaded_after_an_upload(url: str, tmp_path: Path) -> None:
    state = training_state()
    stock_save(state, tmp_path / "c", thread_count=2)
    upload(tmp_path / "c", url)
    assert same(state, load(blank(state), url))


def test_an_object_of_many_parts(url: str) -> None:
    state = {"big": torch.randint(0, 256, (23 << 20,), dtype=torch.uint8), "small": torch.ones(3)}
    config = S3ClientConfig(part_size=5 << 20)
    save(state, url, s3client_config=config)
    assert same(state, load(blank(state), url, s3client_config=config))
    assert same(state, their_load(blank(state), url))


def test_a_part_of_the_state_is_loaded(url: str) -> None:
    state = training_state()
    save(state, url)
    assert same({"model": state["model"]}, load({"model": blank(state["model"])}, url))


def test_a_checkpoint_is_replaced_and_its_objects_go(url: str) -> None:
    old, new = {"a": torch.zeros(3), "b": torch.zeros(9)}, {"a": torch.ones(3)}
    hexadecimal = dcp.HexPrefixStrategy(1)
    save(old, url, thread_count=2, prefix_strategy=hexadecimal)
    with dcp.S3FileSystem(REGION).create_stream(f"{url}/0000000000/epoch_1/notes", "wb") as stream:
        stream.write(b"mine")
    save(new, url, prefix_strategy=hexadecimal)
    assert same(new, load(blank(new), url))
    assert keys(url) == [".metadata", "0000000000/epoch_1/__0_2.distcp", "0000000000/epoch_1/notes"]


def test_a_checkpoint_is_not_replaced_where_that_is_not_wanted(url: str) -> None:
    save({"a": torch.zeros(3)}, url, overwrite=False)
    with pytest.raises(CheckpointException, match="Checkpoint already exists"):
        save({"a": torch.ones(3)}, url, overwrite=False)
    assert same({"a": torch.zeros(3)}, load({"a": torch.ones(3)}, url))


@pytest.mark.parametrize("end", ["", "/", "//"])
def test_slashes_at_the_end_of_a_url(url: str, end: str) -> None:
    save({"a": torch.arange(3)}, url + end)
    assert keys(url) == [".metadata", "__0_0.distcp"]
    assert same({"a": torch.arange(3)}, load({"a": torch.zeros(3, dtype=torch.int64)}, url + end))


def test_at_the_top_of_a_bucket(on_s3: S3Server) -> None:
    on_s3.make_bucket("top-of-a-bucket")
    for value in (1, 2):
        save({"a": torch.full((3,), value)}, "s3://top-of-a-bucket")
    assert same({"a": torch.full((3,), 2)}, load({"a": torch.zeros(3, dtype=torch.int64)}, "s3://top-of-a-bucket/"))
    assert keys("s3://top-of-a-bucket") == [".metadata", "__0_1.distcp"]


def test_the_checkpoint_s_id_is_a_url(url: str) -> None:
    state = {"a": torch.arange(4)}
    writer, reader = S3StorageWriter(REGION, url), S3StorageReader(REGION, url)
    for name in ("one", "two"):
        torch_dcp.save(state, checkpoint_id=f"{url}/{name}", storage_writer=writer, no_dist=True)
        loaded = blank(state)
        torch_dcp.load(loaded, checkpoint_id=f"{url}/{name}", storage_reader=reader, no_dist=True)
        assert same(state, loaded)
    assert keys(url) == ["one/.metadata", "one/__0_0.distcp", "two/.metadata", "two/__0_0.distcp"]
    for kind in (S3StorageReader, S3StorageWriter):
        assert kind.validate_checkpoint_id(url)
        assert not kind.validate_checkpoint_id("/a/directory")


def test_reader_and_writer_go_to_other_processes(url: str) -> None:
    state = {"a": torch.arange(4)}
    torch_dcp.save(state, storage_writer=pickle.loads(pickle.dumps(S3StorageWriter(REGION, url))), no_dist=True)
    loaded = blank(state)
    reader = pickle.loads(pickle.dumps(S3StorageReader(REGION, url)))
    torch_dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert same(state, loaded)


class FirstEighth(DefaultLoadPlanner):
    """Wants the first eighth of the rows of every tensor."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return LoadPlan([self._cut(item) for item in plan.items])

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item).narrow(0, 0, read_item.lengths[0])

    def _cut(self, item: ReadItem) -> ReadItem:
        lengths = torch.Size([item.lengths[0] // 8, *item.lengths[1:]])
        return ReadItem(
            item.type, item.dest_index, item.dest_offsets, item.storage_index, item.storage_offsets, lengths
        )


def test_of_an_eighth_only_an_eighth_is_asked_for(on_server: FaultServer) -> None:
    state = {f"t{number}": torch.rand(800, 1000 + number) for number in range(4)}
    save(state, "s3://bucket/c")
    before = len(on_server.gets())
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    reader = S3StorageReader(REGION, "s3://bucket/c")
    torch_dcp.load(loaded, storage_reader=reader, planner=FirstEighth(), no_dist=True)
    assert all(torch.equal(loaded[name][:100], tensor[:100]) for name, tensor in state.items())
    assert not any(loaded[name][100:].any() for name in state)
    spans = [request.headers["range"].removeprefix("bytes=").split("-") for request in on_server.gets()[before:]]
    asked = sum(int(last) - int(first) + 1 for first, last in spans)
    assert asked < 1.1 / 8 * sum(tensor.nbytes for tensor in state.values())


def test_without_obstore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for make in (S3StorageReader, S3StorageWriter):
        with pytest.raises(CheckpointError, match=r"pip install 'engine-loader\[s3\]'"):
            make(REGION, "s3://bucket/c")
    with pytest.raises(CheckpointError, match=r"pip install 'engine-loader\[s3\]'"):
        dcp.S3FileSystem(REGION)
    state = {"a": torch.ones(3)}
    torch_dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    assert os.listdir(tmp_path / "c")


@pytest.mark.parametrize("strategy", [None, dcp.BinaryPrefixStrategy()], ids=["default", "binary"])
def test_objects_of_interrupted_saves_go_when_the_next_is_published(url: str, strategy: Any) -> None:
    class Interrupted(S3StorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            raise RuntimeError("preempted")

    old, new = {"a": torch.zeros(300)}, {"a": torch.ones(300)}
    save(old, url, prefix_strategy=strategy)
    for _ in range(2):
        with pytest.raises(CheckpointException, match="preempted"):
            writer = Interrupted(REGION, url, prefix_strategy=strategy)
            torch_dcp.save(new, storage_writer=writer, no_dist=True)
    files = dcp.S3FileSystem(REGION)
    for name in ("step-2/__0_0.distcp", "notes.txt"):
        with files.create_stream(f"{url}/{name}", "wb") as stream:
            stream.write(b"another's")
    assert same(old, load(blank(old), url))
    save(new, url, prefix_strategy=strategy)
    prefix = "0000000000/" if strategy else ""
    assert keys(url) == sorted([".metadata", f"{prefix}__0_3.distcp", "notes.txt", "step-2/__0_0.distcp"])
    assert same(new, load(blank(new), url))


def test_objects_of_ranks_that_are_gone_go_if_they_are_older(url: str) -> None:
    files = dcp.S3FileSystem(REGION)
    with files.create_stream(f"{url}/__1_0.distcp", "wb") as stream:
        stream.write(b"of another rank")
    time.sleep(2)  # S3 tells of times in seconds
    save({"a": torch.ones(300)}, url)
    assert keys(url) == [".metadata", "__0_0.distcp"]


@pytest.mark.parametrize(
    ("strategy", "left"),
    [
        (lambda: dcp.BinaryPrefixStrategy(prefix_count=4), ["0000000000/__0_1.distcp"]),
        (lambda: dcp.HexPrefixStrategy(5, 1, 300), ["000/epoch_5/__0_1.distcp"]),
        (lambda: dcp.RoundRobinPrefixStrategy(["a", "b/c"]), ["a/__0_1.distcp"]),
    ],
)
def test_what_a_larger_world_left_below_its_prefixes_is_deleted(url: str, strategy: Any, left: list[str]) -> None:
    state = {"a": torch.ones(30)}
    save(state, url, prefix_strategy=strategy())
    files = S3StorageWriter(REGION, url).fs
    kind = strategy()
    ranks = [f"{kind(rank)}0.distcp" for rank in (1, 3, 290)]
    others = ["9/__1_0.distcp", "step-2/__1_0.distcp", "0000000000/notes.txt", f"{kind(7)}.distcp", "x/a/__1_0.distcp"]
    for name in [*ranks, *others]:
        with files.create_stream(f"{url}/{name}", "wb") as stream:
            stream.write(b"left behind")
    time.sleep(1.1)  # times are of whole seconds in S3
    save(state, url, prefix_strategy=strategy())
    assert keys(url) == sorted([".metadata", *left, *others])
    assert same(state, load(blank(state), url))
