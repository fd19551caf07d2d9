"""``dcp.load`` through this package's reader: the same values as with torch's, and one clear error for each damage."""

import os
import pickle
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat

from engine_loader import CheckpointError, dcp
from engine_loader.dcp import reader
from engine_loader.loading.training import boxes
from engine_loader.loading.training.boxes import BoxRead
from engine_loader.loading.training.files import DcpFiles
from engine_loader.loading.training.items import Items
from engine_loader.report.load_report import LoadReport
from engine_loader.settings import LoaderSettings
from engine_loader.sources.posix import PosixSource
from engine_loader.transfer.protocol import Transfer
from tests.support.resources import left_open, open_resources

from .states import bits, blank, load, same, save, stock_save, training_state


@pytest.mark.parametrize("options", [{}, {"thread_count": 3}, {"single_file_per_rank": False}])
def test_what_torch_wrote_is_read(tmp_path, options):
    state = training_state()
    stock_save(state, tmp_path / "c", **options)
    assert same(state, load(blank(state), tmp_path / "c"))


@pytest.mark.parametrize("engine", ["cpp", "python"])
def test_every_engine_reads_it(tmp_path, engine):
    state = training_state()
    stock_save(state, tmp_path / "c")
    assert same(state, load(blank(state), tmp_path / "c", engine=engine, threads=2))


def test_a_part_of_the_state_is_loaded(tmp_path):
    state = training_state()
    stock_save(state, tmp_path / "c")
    assert same({"model": state["model"]}, load({"model": blank(state["model"])}, tmp_path / "c"))


def test_without_a_state_dict_to_load_into_it_can_be_converted(tmp_path):
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state = training_state()
    stock_save(state, tmp_path / "c")
    loaded: dict[str, object] = {}
    reader = dcp.FileSystemReader(tmp_path / "c")
    _load_state_dict(loaded, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert same(state["model"], loaded["model"])


def test_targets_of_any_strides_and_types_are_filled(tmp_path):
    values = torch.arange(600 * 700, dtype=torch.float32).reshape(600, 700)
    stock_save(dict.fromkeys(("rows", "transposed", "gapped", "double", "parameter"), values), tmp_path / "c")
    targets = {
        "rows": torch.zeros(600, 900)[:, 100:800],
        "transposed": torch.zeros(700, 600).t(),
        "gapped": torch.zeros(600, 1400)[:, ::2],
        "double": torch.zeros(600, 700, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.zeros(600, 700)),
    }
    load(targets, tmp_path / "c")
    for name, target in targets.items():
        assert torch.equal(target.detach().to(torch.float32), values), name


def test_a_tensor_that_was_stored_transposed_is_read_right(tmp_path):
    state = {"a": torch.arange(12000.0).reshape(60, 200).t(), "b": torch.arange(9000).reshape(30, 300)[:, 10:20]}
    stock_save(state, tmp_path / "c")
    loaded = load(blank(state), tmp_path / "c")
    assert same(state, loaded)


def test_compressed_items_are_read(tmp_path):
    state = training_state()
    stock_save(state, tmp_path / "c", _extensions=[ZStandard()])
    assert same(state, load(blank(state), tmp_path / "c"))


def test_tensors_that_are_no_plain_bytes_are_read(tmp_path):
    state = {"conj": torch.randn(5, dtype=torch.complex64).conj(), "b": torch.ones(4)}
    stock_save(state, tmp_path / "c")
    loaded = load(blank(state), tmp_path / "c")
    assert torch.equal(loaded["conj"].resolve_conj(), state["conj"].resolve_conj())


def test_safetensors_of_torch_s_own_writer_are_read(tmp_path):
    # torch 2.13's own reader cannot: it stores the offset 0 for every tensor.
    state = {"a": torch.randn(30, 4), "b": torch.arange(7, dtype=torch.uint8), "c": torch.randn(5).bfloat16()}
    stock_save(state, tmp_path / "c", serialization_format=SerializationFormat.SAFETENSORS)
    assert same(state, load(blank(state), tmp_path / "c"))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return stock_save({"a": torch.arange(6000.0).reshape(60, 100), "b": torch.ones(5)}, tmp_path / "c")


def files_of(path: Path) -> DcpFiles:
    return DcpFiles(PosixSource(), str(path), LoaderSettings())


@pytest.mark.parametrize("writer", [stock_save, save])
@pytest.mark.parametrize(("offsets", "lengths"), [((7, 0), (3, 100)), ((0, 40), (60, 7)), ((59, 99), (1, 1))])
def test_any_part_of_a_stored_tensor_is_read(tmp_path, writer, offsets, lengths):
    whole = torch.arange(6000).reshape(60, 100)
    writer({"a": whole}, tmp_path / "c")
    with files_of(tmp_path / "c") as files:
        ((index, info),) = files.read_metadata().storage_data.items()
        (found,) = Items(files).locate([(index.fqn, info)])
        target = torch.zeros(lengths, dtype=torch.int64)
        files.read([files.part(found, offsets, lengths, target)])
    want = whole[offsets[0] : offsets[0] + lengths[0], offsets[1] : offsets[1] + lengths[1]]
    assert torch.equal(target, want)


@pytest.mark.parametrize("most_span_bytes", [0, 1 << 20])
def test_a_narrow_column_is_read(tmp_path, monkeypatch, most_span_bytes):
    monkeypatch.setattr(boxes, "_MOST_SPAN_BYTES", most_span_bytes)
    whole = torch.arange(10_000 * 40).to(torch.int16).reshape(10_000, 40)
    stock_save({"a": whole}, tmp_path / "c")
    with files_of(tmp_path / "c") as files:
        ((index, info),) = files.read_metadata().storage_data.items()
        (found,) = Items(files).locate([(index.fqn, info)])
        target = torch.zeros(10_000, 2, dtype=torch.int16)
        files.read([files.part(found, (0, 7), (10_000, 2), target)])
    assert torch.equal(target, whole[:, 7:9])


def test_only_the_bytes_of_a_part_are_read(tmp_path):
    stock_save({"a": torch.zeros(1000, 50_000, dtype=torch.uint8)}, tmp_path / "c")
    with files_of(tmp_path / "c") as files:
        ((index, info),) = files.read_metadata().storage_data.items()
        (found,) = Items(files).locate([(index.fqn, info)])
        before, after = LoadReport(), LoadReport()
        files.finish(before)
        files.read([files.part(found, (500, 0), (2, 50_000), torch.empty(2, 50_000, dtype=torch.uint8))])
        files.finish(after)
    assert after.bytes_read - before.bytes_read == 100_000


def data_file(path: Path) -> Path:
    (found,) = path.glob("*.distcp")
    return found


def test_a_file_that_was_cut_short_is_told(stored):
    os.truncate(data_file(stored), data_file(stored).stat().st_size - 100)
    with pytest.raises(CheckpointException, match=r"__0_0.distcp: at byte \d+: 'b' is \d+ bytes here, but the file"):
        load({"a": torch.zeros(60, 100), "b": torch.zeros(5)}, stored)


def test_a_missing_file_is_told(stored):
    data_file(stored).unlink()
    with pytest.raises(CheckpointException, match=r"__0_0.distcp: could not open the file: No such file"):
        load({"a": torch.zeros(60, 100)}, stored)


def test_no_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointException, match=r"\.metadata: could not open the file: No such file"):
        load({"a": torch.zeros(60, 100)}, tmp_path)


def test_an_item_that_lies_outside_its_file_is_told(stored):
    metadata = pickle.loads((stored / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset += 1 << 40
    (stored / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointException, match="but the file ends after"):
        load({"a": torch.zeros(60, 100)}, stored)


def test_metadata_of_another_save_is_told(stored, tmp_path):
    other = stock_save({"a": torch.zeros(61, 101), "b": torch.ones(5)}, tmp_path / "other")
    shutil.copy(data_file(other), data_file(stored))
    with pytest.raises(
        CheckpointException, match=r"metadata and files are of different saves|cannot be read as a tensor"
    ):
        load({"a": torch.zeros(60, 100)}, stored)


def test_bytes_that_are_no_item_are_told(stored):
    data_file(stored).write_bytes(b"x" * data_file(stored).stat().st_size)
    with pytest.raises(CheckpointException, match="the item of 'a' cannot be read as a tensor"):
        load({"a": torch.zeros(60, 100)}, stored)


def test_a_hostile_tensor_item_runs_nothing(tmp_path):
    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was-run"),))

    path = stock_save({"a": torch.zeros(3)}, tmp_path / "c")
    with data_file(path).open("wb") as file:
        torch.save(Runs(), file)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.length = data_file(path).stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointException, match="the item of 'a' cannot be read as a tensor"):
        load({"a": torch.zeros(3)}, path)
    assert not (tmp_path / "was-run").exists()


def test_a_shape_that_differs_is_told(stored):
    with pytest.raises((CheckpointException, CheckpointError, ValueError)):
        load({"a": torch.zeros(60, 101)}, stored)


@pytest.fixture
def small_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 tensors of 4 KiB; the first group is of 4 KiB, and 16 KiB may be read beside their targets."""
    monkeypatch.setattr(reader, "_FIRST_GROUP_BYTES", 4 << 10)
    monkeypatch.setattr(reader, "_BESIDE_BYTES", 16 << 10)
    return stock_save({f"t{n}": torch.full((64, 32), n, dtype=torch.bfloat16) for n in range(60)}, tmp_path / "c")


def test_what_is_read_beside_its_targets_takes_little_memory(small_groups, monkeypatch):
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0
    make = DcpFiles.part

    def part(self: DcpFiles, *args: Any) -> BoxRead:
        nonlocal most
        made_now = make(self, *args)
        assert made_now.pending is not None
        made.append(weakref.ref(made_now.pending[0]))
        most = max(most, sum(read.nbytes for ref in made if (read := ref()) is not None))
        return made_now

    monkeypatch.setattr(DcpFiles, "part", part)
    loaded = load({f"t{n}": torch.zeros(64, 32) for n in range(60)}, small_groups)
    assert all(bool((tensor == int(name[1:])).all()) for name, tensor in loaded.items())
    assert 16 << 10 <= most <= 2 * (16 << 10)


def test_what_goes_straight_to_its_targets_is_asked_for_in_few_groups(small_groups, monkeypatch):
    groups: list[int] = []
    submit = DcpFiles.submit

    def counted(self: DcpFiles, parts: Sequence[BoxRead]) -> Transfer | None:
        groups.append(len(parts))
        return submit(self, parts)

    monkeypatch.setattr(DcpFiles, "submit", counted)
    load({f"t{n}": torch.zeros(64, 32, dtype=torch.bfloat16) for n in range(60)}, small_groups)
    assert groups[0] == 1, "the first read begins at once"
    assert sum(groups) == 60
    assert len(groups) <= 8


def test_nothing_stays_open(stored):
    before = open_resources()
    for _ in range(3):
        load({"a": torch.zeros(60, 100)}, stored)
    assert left_open(before) == []


def test_the_reader_can_be_reused_for_another_directory(stored, tmp_path):
    save({"a": torch.full((60, 100), 2.0)}, tmp_path / "second")
    reader = dcp.FileSystemReader(stored)
    for path, want in ((stored, 1.0), (tmp_path / "second", 2.0)):
        target = torch.zeros(60, 100)
        torch_dcp.load({"a": target}, storage_reader=reader, checkpoint_id=path, no_dist=True)
        assert target[0, 1] == want
        assert bits(target) != bits(torch.zeros(60, 100))
