"""What interrupted saves left in a directory goes when a save there has published its metadata."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException

from engine_loader import dcp
from engine_loader.dcp.broken_saves import left_behind

from .states import blank, load, same, save, stock_save

OLD, NEW = {"a": torch.zeros(300), "b": torch.zeros(9)}, {"a": torch.ones(300), "b": torch.ones(9)}


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


class Interrupted(dcp.FileSystemWriter):
    """Ends when the data was written, as a preempted job does."""

    def finish(self, metadata, results):
        raise RuntimeError("preempted")


def broken_save(path: Path, **options) -> None:
    with pytest.raises(CheckpointException, match="preempted"):
        torch_dcp.save(NEW, storage_writer=Interrupted(path, **options), no_dist=True)


@pytest.mark.parametrize("first", ["a checkpoint", "torch's checkpoint", "nothing"])
def test_files_of_broken_saves_go_when_the_next_is_published(tmp_path, first):
    path = tmp_path / "c"
    if first == "a checkpoint":
        save(OLD, path)
    elif first == "torch's checkpoint":
        stock_save(OLD, path)
    for _ in range(3):
        broken_save(path, thread_count=2)
        if first != "nothing":
            assert same(OLD, load(blank(OLD), path))
    assert len([name for name in names(path) if name.endswith(".distcp")]) == (7 if first != "nothing" else 6)
    save(NEW, path)
    assert names(path) == [".metadata", "__0_7.distcp" if first != "nothing" else "__0_6.distcp"]
    assert same(NEW, load(blank(NEW), path))


def test_files_go_although_the_metadata_that_named_them_is_damaged(tmp_path):
    path = save(OLD, tmp_path / "c")
    (path / ".metadata").write_bytes(b"damaged")
    save(NEW, path)
    assert names(path) == [".metadata", "__0_1.distcp"]


def test_files_of_ranks_that_are_gone_go_if_they_are_older(tmp_path):
    path = save(OLD, tmp_path / "c")
    for name, seconds in {"__1_0.distcp": 10, "__12_3.distcp": 10, "__2_0.distcp": 1 << 40}.items():
        (path / name).write_bytes(b"data")
        os.utime(path / name, (seconds, seconds))
    save(NEW, path)
    assert names(path) == [".metadata", "__0_1.distcp", "__2_0.distcp"]


def test_what_is_not_ours_stays(tmp_path):
    path = save(OLD, tmp_path / "c")
    others = ["notes.txt", "model.safetensors", "__0_0.distcp.bak", "x__0_0.distcp", "__0_x.distcp", "__0_99.distcp"]
    for name in others:
        (path / name).write_bytes(b"data")
    (path / "step-2").mkdir()
    (path / "step-2" / "__0_0.distcp").write_bytes(b"data")
    for name in [*others, "step-2/__0_0.distcp"]:
        if "99" not in name:
            os.utime(path / name, (10, 10))
    save(NEW, path)
    # The new file's number is above that of every file of its rank.
    assert names(path) == sorted([".metadata", "__0_100.distcp", "step-2", *others[:-1]])
    assert names(path / "step-2") == ["__0_0.distcp"]


def test_files_that_other_metadata_names_stay(tmp_path):
    """As where each rank writes a checkpoint of its own into one directory."""
    path = save(OLD, tmp_path / "c")
    (path / ".metadata").rename(path / "__1.metadata")
    broken_save(path)
    save(NEW, path)
    assert names(path) == [".metadata", "__0_0.distcp", "__0_2.distcp", "__1.metadata"]


def test_nothing_goes_where_other_metadata_cannot_be_read(tmp_path, caplog):
    path = save(OLD, tmp_path / "c")
    (path / "__1.metadata").write_bytes(b"damaged")
    broken_save(path)
    save(NEW, path)
    assert names(path) == [".metadata", "__0_1.distcp", "__0_2.distcp", "__1.metadata"]
    assert "files that interrupted saves may have left were not looked for" in caplog.text
    assert same(NEW, load(blank(NEW), path))


@pytest.mark.parametrize("failing", ["metadata", "data"])
def test_nothing_goes_before_the_metadata_is_published(tmp_path, monkeypatch, failing):
    path = save(OLD, tmp_path / "c")
    broken_save(path)
    before = names(path)

    def fail(*_):
        raise OSError("no space left")

    writer = dcp.FileSystemWriter(path)
    monkeypatch.setattr(writer, "_publish" if failing == "metadata" else "_write_file", fail)
    with pytest.raises(CheckpointException, match="no space left"):
        torch_dcp.save(NEW, storage_writer=writer, no_dist=True)
    assert set(before) <= set(names(path))
    assert same(OLD, load(blank(OLD), path))


@pytest.mark.parametrize(
    ("files", "used", "gone"),
    [
        ({"__0_1.distcp": 5, "__0_2.distcp": 5}, {"__0_2.distcp"}, {"__0_1.distcp"}),
        ({"__0_3.distcp": 1, "__0_2.distcp": 5}, {"__0_2.distcp"}, set()),
        ({"p/__0_1.distcp": 9, "q/__0_1.distcp": 9, "p/__0_2.distcp": 5}, {"p/__0_2.distcp"}, {"p/__0_1.distcp"}),
        ({"__1_0.distcp": 4, "__2_0.distcp": 5, "__0_2.distcp": 5}, {"__0_2.distcp"}, {"__1_0.distcp"}),
        ({"__1_0.distcp": 4}, {"__0_2.distcp"}, set()),
        ({"__1_0.distcp": 4}, set(), set()),
        ({".metadata": 1, "model-1.safetensors": 1, "__0_2.distcp": 5}, {"__0_2.distcp"}, set()),
    ],
)
def test_what_is_older(files, used, gone):
    assert left_behind(files, used) == gone
