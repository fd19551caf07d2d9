"""``dcp.save`` through this package's writer: what others read of it, and what a crash leaves."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

import engine_loader
from engine_loader import dcp
from engine_loader.dcp import SerializationFormat

from .states import blank, load, same, save, stock_save, training_state

OPTIONS = [
    {},
    {"thread_count": 3},
    {"single_file_per_rank": False, "thread_count": 2},
    {"sync_files": False},
    {"per_thread_copy_ahead": 0},
]
SAFETENSORS = {"serialization_format": SerializationFormat.SAFETENSORS}


def stock_load(state, path):
    torch_dcp.load(state, storage_reader=torch_dcp.FileSystemReader(path), no_dist=True)
    return state


@pytest.mark.parametrize("options", OPTIONS)
def test_torch_reads_what_is_written(tmp_path, options):
    state = training_state()
    save(state, tmp_path / "c", **options)
    assert same(state, stock_load(blank(state), tmp_path / "c"))


@pytest.mark.parametrize("format_options", [{}, SAFETENSORS])
@pytest.mark.parametrize("options", OPTIONS)
def test_this_package_reads_what_is_written(tmp_path, options, format_options):
    state = training_state()
    del state["kinds"]["torch.complex64"]
    save(state, tmp_path / "c", **options, **format_options)
    assert same(state, load(blank(state), tmp_path / "c"))


def test_files_are_named_as_torch_names_them(tmp_path):
    state = {"a": torch.zeros(3), "b": torch.zeros(4)}
    save(state, tmp_path / "ours", thread_count=2)
    stock_save(state, tmp_path / "torchs", thread_count=2)
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "torchs"))
    assert sorted(os.listdir(tmp_path / "ours")) == [".metadata", "__0_0.distcp", "__0_1.distcp"]


def test_compressed_items_are_written(tmp_path):
    state = training_state()
    save(state, tmp_path / "c", _extensions=[ZStandard()])
    assert same(state, stock_load(blank(state), tmp_path / "c"))
    assert same(state, load(blank(state), tmp_path / "c"))


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "odd": torch.arange(7, dtype=torch.uint8),
        "weight": torch.randn(30, 40).bfloat16(),
        "transposed": torch.randn(9, 5).t(),
        "double": torch.randn(3, dtype=torch.float64),
        "scalar": torch.tensor(4.5),
        "empty": torch.empty(0, 3),
        "ü": torch.ones(2),
    }


def test_safetensors_reads_the_files(tmp_path):
    save(tensors(), tmp_path / "c", **SAFETENSORS)
    assert same(tensors(), load_file(tmp_path / "c" / "__0_0.distcp"))


def test_the_offsets_in_the_metadata_are_those_in_the_file(tmp_path):
    save(tensors(), tmp_path / "c", **SAFETENSORS)
    content = (tmp_path / "c" / "__0_0.distcp").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    metadata = header.pop("__metadata__")
    assert (metadata["DCP_VERSION"], metadata["format"]) == ("1.0", "pt")
    assert json.loads(metadata["DCP_SHARDING_INFO"])["weight"] == {"saved_offsets": [0, 0]}
    stored = dcp.FileSystemReader(tmp_path / "c").read_metadata().storage_data
    for index, info in stored.items():
        begin, end = header[index.fqn]["data_offsets"]
        assert (info.offset, info.length) == (8 + header_bytes + begin, end - begin)
        if tensors()[index.fqn].numel():
            assert info.offset % tensors()[index.fqn].itemsize == 0


def test_torch_s_hugging_face_reader_reads_the_files(tmp_path):
    save(tensors(), tmp_path / "c", **SAFETENSORS)
    (tmp_path / "hf").mkdir()
    shutil.copy(tmp_path / "c" / "__0_0.distcp", tmp_path / "hf" / "model-00001-of-00001.safetensors")
    target = blank(tensors())
    torch_dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path / "hf")), no_dist=True)
    assert same(tensors(), target)


def test_what_torch_s_hugging_face_writer_writes_is_opened(tmp_path):
    state = {name: tensor for name, tensor in tensors().items() if name != "transposed"}
    torch_dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "hf")), no_dist=True)
    with engine_loader.open_checkpoint(tmp_path / "hf") as checkpoint:
        assert same(state, dict(checkpoint.tensors()))


def test_what_safetensors_cannot_hold_is_refused(tmp_path):
    state = {"a": torch.zeros(3, dtype=torch.complex128)}
    with pytest.raises(CheckpointException, match=r"'a' is torch.complex128, which safetensors cannot hold"):
        save(state, tmp_path / "c", **SAFETENSORS)
    with pytest.raises(ValueError, match="transforms go with TORCH_SAVE only"):
        dcp.FileSystemWriter(tmp_path / "c", _extensions=[ZStandard()], **SAFETENSORS)
    with pytest.raises(ValueError, match="thread_count is 0"):
        dcp.FileSystemWriter(tmp_path / "c", thread_count=0)


def test_a_checkpoint_is_replaced_and_its_files_go(tmp_path):
    old, new = {"a": torch.zeros(3), "b": torch.zeros(9)}, {"a": torch.ones(3)}
    save(old, tmp_path / "c", thread_count=2)
    (tmp_path / "c" / "notes.txt").write_text("mine")
    save(new, tmp_path / "c")
    assert same(new, stock_load(blank(new), tmp_path / "c"))
    assert sorted(os.listdir(tmp_path / "c")) == [".metadata", "__0_2.distcp", "notes.txt"]


def test_more_threads_than_tensors_leave_no_empty_files(tmp_path):
    for value in (0, 1):
        save({"a": torch.full((3,), value)}, tmp_path / "c", thread_count=4)
    assert len(list((tmp_path / "c").glob("*.distcp"))) == 1
    assert same(
        {"a": torch.ones(3, dtype=torch.int64)}, stock_load({"a": torch.zeros(3, dtype=torch.int64)}, tmp_path / "c")
    )


def test_a_checkpoint_is_not_replaced_where_that_is_not_wanted(tmp_path):
    save({"a": torch.zeros(3)}, tmp_path / "c")
    with pytest.raises(CheckpointException, match="Checkpoint already exists"):
        save({"a": torch.ones(3)}, tmp_path / "c", overwrite=False)
    assert same({"a": torch.zeros(3)}, load({"a": torch.ones(3)}, tmp_path / "c"))
    save({"a": torch.ones(3)}, tmp_path / "new", overwrite=False)


class Crashes(dcp.FileSystemWriter):
    """Ends as a crash would, before the chosen step."""

    step = ""

    def write_data(self, plan, planner):
        if self.step == "after data":
            super().write_data(plan, planner)
        raise RuntimeError("crashed")


class CrashesAtMetadata(dcp.FileSystemWriter):
    def __init__(self, *args, at, **options):
        super().__init__(*args, **options)
        setattr(self.fs, at, self._crash)

    def _crash(self, *_):
        raise RuntimeError("crashed")


@pytest.mark.parametrize("step", ["before data", "after data", "rename"])
@pytest.mark.parametrize("options", [{}, SAFETENSORS])
def test_a_crash_leaves_the_old_checkpoint(tmp_path, step, options):
    old, new = {"a": torch.zeros(300)}, {"a": torch.ones(300)}
    save(old, tmp_path / "c", **options)
    if step == "rename":
        writer = CrashesAtMetadata(tmp_path / "c", at="rename", **options)
    else:
        writer = Crashes(tmp_path / "c", **options)
        writer.step = step
    with pytest.raises(CheckpointException, match="crashed"):
        torch_dcp.save(new, storage_writer=writer, no_dist=True)
    assert same(old, load(blank(old), tmp_path / "c"))
    save(new, tmp_path / "c", **options)
    assert same(new, load(blank(old), tmp_path / "c"))


def test_a_thread_that_fails_fails_the_save(tmp_path):
    class Planner(torch_dcp.DefaultSavePlanner):
        def resolve_data(self, write_item):
            if write_item.index.fqn == "bad":
                raise RuntimeError("no such tensor")
            return super().resolve_data(write_item)

    state = {"bad": torch.zeros(1), "a": torch.zeros(1000), "b": torch.zeros(2000)}
    with pytest.raises(CheckpointException, match="no such tensor"):
        writer = dcp.FileSystemWriter(tmp_path / "c", thread_count=3)
        torch_dcp.save(state, storage_writer=writer, planner=Planner(), no_dist=True)
    assert not (tmp_path / "c" / ".metadata").exists()


def test_a_view_is_stored_without_what_it_is_a_view_of(tmp_path):
    state = {"a": torch.zeros(1_000_000)[:10]}
    save(state, tmp_path / "c")
    assert (tmp_path / "c" / "__0_0.distcp").stat().st_size < 10_000


def test_replacing_says_nothing(tmp_path: Path):
    save({"a": torch.zeros(3)}, tmp_path / "c")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save({"a": torch.zeros(3)}, tmp_path / "c")
    assert not any("existing checkpoint" in str(warning.message) for warning in caught)


PEAK = """
import sys, warnings
import torch
import torch.distributed.checkpoint as torch_dcp
from engine_loader import dcp

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def save(state, path, items, threads):
    items = dcp.SerializationFormat(items)
    writer = dcp.FileSystemWriter(path, serialization_format=items, thread_count=int(threads), sync_files=False)
    torch_dcp.save(state, storage_writer=writer, no_dist=True)

warnings.simplefilter("ignore")
torch.set_num_threads(1)
save({"t": torch.ones(10)}, sys.argv[1] + "/first", *sys.argv[2:])  # what is imported is not what is measured
state = {f"t{number}": torch.full((10 << 20,), number, dtype=torch.uint8) for number in range(16)}
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
save(state, sys.argv[1] + "/second", *sys.argv[2:])
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.parametrize("items", ["torch_save", "safetensors"])
@pytest.mark.parametrize("threads", [1, 4])
def test_no_bucket_is_held_in_memory(tmp_path: Path, items: str, threads: int) -> None:
    """Of 160 MiB, in buckets of 160 or 40."""
    command = [sys.executable, "-c", PEAK, str(tmp_path), items, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30 << 20
