"""Hugging Face checkpoints through dcp.save and dcp.load: what torch writes is read, and the other way round."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file, save, save_file
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from typer.testing import CliRunner

from benchmarks.dcp import resident_bytes
from engine_loader import CheckpointError, dcp, open_checkpoint
from engine_loader.cli import app
from engine_loader.conversion import convert_checkpoint
from engine_loader.formats.hf_index import INDEX_NAME
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import LoaderSettings, load_settings

from .hf_ranks import FILES, full_tensors
from .ranks import run
from .states import bits, blank, same

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16)
DTYPES += (torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
WRITERS = {"ours": dcp.HuggingFaceStorageWriter, "torch's": torch_dcp.HuggingFaceStorageWriter}
READERS: dict[str, Any] = {"ours": dcp.HuggingFaceStorageReader, "torch's": torch_dcp.HuggingFaceStorageReader}
PARTS = ("ours-parts", "torchs-parts")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    found = {str(dtype): (torch.randn(6, 10) * 9).to(dtype) for dtype in DTYPES}
    return found | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "cut": torch.randn(9, 9)[2:7, 1:4]}


def write(state: dict[str, Any], path: Path, *, by: str = "ours", **options: Any) -> Path:
    torch_dcp.save(state, storage_writer=WRITERS[by](str(path), **options), no_dist=True)
    return path


def load(state: dict[str, Any], path: Path, *, by: str = "ours") -> dict[str, Any]:
    loaded = blank(state)
    torch_dcp.load(loaded, storage_reader=READERS[by](str(path)), no_dist=True)
    return loaded


@pytest.mark.parametrize("options", [{}, {"thread_count": 3}, {"save_distributed": True}])
def test_each_reads_what_the_other_wrote(tmp_path, options):
    state = tensors()
    files = {name: 1 + number % 3 for number, name in enumerate(state)}
    paths = {
        whose: write(state, tmp_path / whose, by=whose, fqn_to_index_mapping=files, **options) for whose in WRITERS
    }
    assert sorted(os.listdir(paths["ours"])) == sorted(os.listdir(paths["torch's"]))
    for whose, path in paths.items():
        assert same(state, load(state, path)), whose
        assert same(state, load(state, path, by="torch's")), whose
        with open_checkpoint(path) as checkpoint:
            assert same(state, dict(checkpoint.tensors())), whose
    if not options.get("save_distributed"):
        indexes = [json.loads((path / INDEX_NAME).read_text()) for path in paths.values()]
        assert indexes[0]["weight_map"] == indexes[1]["weight_map"]
        assert indexes[0]["metadata"] == {"total_size": sum(tensor.nbytes for tensor in state.values())}


def test_numbers_of_four_bits(tmp_path):
    four = torch.arange(24, dtype=torch.uint8).reshape(3, 8).view(torch.float4_e2m1fn_x2)
    for whose in WRITERS:
        path = write({"four": four}, tmp_path / whose, by=whose)
        loaded = {"four": torch.zeros(3, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
        torch_dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=True)
        assert bits(loaded["four"]) == bits(four), whose


def test_a_model_as_on_the_hub_is_read(tmp_path):
    state = tensors()
    names = list(state)
    halves = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, inside in halves.items():
        save_file({name: state[name].contiguous() for name in inside}, tmp_path / file)
    assert same(state, load(state, tmp_path))
    # A copy of another save, which the index does not name.
    save_file({names[0]: torch.zeros_like(state[names[0]])}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointException, match=r"is also in a\.safetensors"):
        load(state, tmp_path)
    listed = {name: file for file, inside in halves.items() for name in inside}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": listed}))
    assert same(state, load(state, tmp_path))


def test_parts_of_rows_go_straight_into_the_state_dict(tmp_path):
    """No copies of files: what is read takes no memory beside the tensors."""
    state = {f"t{number}": torch.randn(512, 4096) for number in range(16)}
    path = write(state, tmp_path / "c", fqn_to_index_mapping={name: 1 + int(name[1:]) % 4 for name in state})
    targets = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    torch_dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=True)
    for target in targets.values():
        target.fill_(1)
    before = resident_bytes(peak=False)
    torch_dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=True)
    assert resident_bytes(peak=True) - before < 32 << 20
    assert same(state, targets)


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes saved it, and loaded it themselves, cut in other ways."""
    directory = tmp_path_factory.mktemp("hf_by_two")
    run("save", 2, directory, module="tests.dcp.hf_ranks")
    return directory


@pytest.mark.parametrize("name", [*PARTS, "ours-whole", "torchs-whole"])
def test_what_two_ranks_saved_is_loaded_by_one(saved_by_two, name):
    assert same(full_tensors(), load(full_tensors(), saved_by_two / name))


def test_two_ranks_write_the_files_that_torch_writes(saved_by_two):
    parts = [f"shard-0000{rank}-model-0000{file}-of-00002.safetensors" for rank in (1, 2) for file in (1, 2)]
    whole = [INDEX_NAME, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "sharded"]
    for whose in ("ours", "torchs"):
        assert sorted(os.listdir(saved_by_two / f"{whose}-parts")) == parts
        assert sorted(os.listdir(saved_by_two / f"{whose}-whole")) == sorted(whole)
    for file in whole[1:3]:
        ours, torchs = (load_file(saved_by_two / f"{whose}-whole" / file) for whose in ("ours", "torchs"))
        assert same(torchs, ours)
    ours, torchs = (
        json.loads((saved_by_two / f"{whose}-whole" / INDEX_NAME).read_text()) for whose in ("ours", "torchs")
    )
    assert ours == torchs


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_put_together_wherever_weights_are_read(saved_by_two, name, tmp_path):
    path, full = saved_by_two / name, full_tensors()
    with open_checkpoint(path, key_mapping={"^model[.]": ""}) as checkpoint:
        assert same({key.removeprefix("model."): full[key] for key in full}, dict(checkpoint.tensors()))
        columns = checkpoint.get_slice("columns")[1:5, 3:9]
        assert torch.equal(columns, full["model.columns"][1:5, 3:9])
    settings = load_settings({}).settings.loader
    streamed = dict(stream_weights(map(str, path.iterdir()), settings))
    assert same(full, streamed)
    convert_checkpoint(str(path), str(tmp_path / "model"))
    assert same(full, load_file(tmp_path / "model" / "model.safetensors"))
    shown = CliRunner().invoke(app, ["inspect", "--check", "--json", "--tensors", str(path)])
    answer = json.loads(shown.output)
    assert answer["check"] == {"sound": True, "problems": [], "notes": []}
    assert {tensor["name"]: tensor["shape"] for tensor in answer["tensors"]} == {
        key: list(value.shape) for key, value in full.items()
    }


def test_files_of_more_ranks_than_this_save_has_are_deleted(tmp_path):
    state = {"a": torch.randn(4, 4)}
    path = tmp_path / "c"
    write(state, path, save_distributed=True)
    old = path / "shard-00007-model-00001-of-00001.safetensors"
    mine = path / "shard-mine.safetensors"
    for file in (old, mine):
        file.write_bytes(save({"mine": torch.ones(1)}))
        os.utime(file, (1, 1))
    write(state, path, save_distributed=True)
    assert sorted(os.listdir(path)) == ["shard-00001-model-00001-of-00001.safetensors", mine.name]


def part(path: Path, number: int, values: dict[str, torch.Tensor], info: object) -> None:
    """One rank's file, with any DCP_SHARDING_INFO."""
    text = info if isinstance(info, str) else json.dumps(info)
    file = path / f"shard-{number:05}-model-00001-of-00001.safetensors"
    file.write_bytes(save(values, metadata={"DCP_SHARDING_INFO": text, "format": "pt"}))


def at(*offsets: Any) -> dict[str, Any]:
    return {"a": {"saved_offsets": list(offsets)}}


LIES: dict[str, tuple[object, str]] = {
    "overlap": (at(1, 0), "are not the whole tensor"),
    "the same place": (at(0, 0), "is also in"),
    "gap": (at(3, 0), "are not the whole tensor"),
    "another column": (at(2, 1), "are not the whole tensor"),
    "negative": (at(-2, 0), "DCP_SHARDING_INFO in the header puts 'a'"),
    "huge": (at(1 << 62, 0), "end at|are not the whole tensor"),
    "larger than any": (at(1 << 70, 0), "DCP_SHARDING_INFO in the header puts 'a'"),
    "too few": (at(2), "DCP_SHARDING_INFO in the header puts 'a'"),
    "too many": (at(2, 0, 0), "DCP_SHARDING_INFO in the header puts 'a'"),
    "no numbers": (at("2", 0), "no list of saved_offsets"),
    "true": (at(2, True), "no list of saved_offsets"),
    "fractions": (at(2.0, 0), "no list of saved_offsets"),
    "no tensor": ({"b": {"saved_offsets": [2, 0]}}, "no list of saved_offsets"),
    "no entry": ({"a": [2, 0]}, "no list of saved_offsets"),
    "a list": ([], "is not an object"),
    "no JSON": ("{", "is not valid JSON"),
    "nested": ("[" * 100_000, "is not valid JSON"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_where_parts_belong_are_told(tmp_path, lie):
    info, told = LIES[lie]
    value = torch.ones(2, 3)
    part(tmp_path, 1, {"a": value}, at(0, 0))
    part(tmp_path, 2, {"a": value}, info)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointException, match=told):
        load({"a": torch.ones(4, 3)}, tmp_path)
    shown = CliRunner().invoke(app, ["inspect", "--check", str(tmp_path)])
    assert shown.exit_code == 1
    assert "problem" in shown.output


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _other_type(path: Path) -> None:
    part(path.parent, 2, {"a": torch.ones(2, 3).half()}, at(2, 0))


def _other_dimensions(path: Path) -> None:
    part(path.parent, 2, {"a": torch.ones(2)}, at(2))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_cut, "cut short"),
        (_other_type, r"'a' is F16 \[2, 3\] here, and F32 \[2, 3\] in"),
        (_other_dimensions, r"'a' is F32 \[2\] here"),
        (os.unlink, None),
    ],
)
def test_parts_that_do_not_fit_are_told(tmp_path, harm: Callable[[Path], None], told):
    part(tmp_path, 1, {"a": torch.ones(2, 3)}, at(0, 0))
    part(tmp_path, 2, {"a": torch.ones(2, 3)}, at(2, 0))
    part(tmp_path, 3, {"a": torch.ones(1, 3)}, at(4, 0))
    harm(tmp_path / "shard-00002-model-00001-of-00001.safetensors")
    told = told or "a rank's part is missing"
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointException, match=told):
        load({"a": torch.ones(5, 3)}, tmp_path)


def test_ranks_without_rows_and_boxes_of_two_cuts(tmp_path):
    whole = torch.arange(20.0).reshape(4, 5)
    part(tmp_path, 1, {"a": whole[:2, :3].contiguous(), "b": whole}, {**at(0, 0), "b": {"saved_offsets": [0, 0]}})
    part(tmp_path, 2, {"a": whole[:2, 3:].contiguous(), "b": whole[4:]}, {**at(0, 3), "b": {"saved_offsets": [4, 0]}})
    part(tmp_path, 3, {"a": whole[2:, :3].contiguous(), "b": whole[4:]}, {**at(2, 0), "b": {"saved_offsets": [4, 0]}})
    part(tmp_path, 4, {"a": whole[2:, 3:].contiguous()}, at(2, 3))
    expected = {"a": whole, "b": whole}
    assert same(expected, load(expected, tmp_path))
    with open_checkpoint(tmp_path) as checkpoint:
        assert same(expected, dict(checkpoint.tensors()))


def test_of_the_files_of_two_saves_the_index_tells_which_count(tmp_path, caplog):
    old, new = ({name: torch.full((4, 4), number) for name in "abc"} for number in (1.0, 2.0))
    write(old, tmp_path, fqn_to_index_mapping={"a": 1, "b": 2, "c": 2})
    write(new, tmp_path)
    assert same(new, load(new, tmp_path))
    assert "hold parts of tensors" not in caplog.text
    write(old, tmp_path, save_distributed=True)
    beside = "shard-00001-model-00001-of-00001.safetensors"
    assert f"{tmp_path / INDEX_NAME} is of another save" in caplog.text
    reads: tuple[Callable[[], dict[str, torch.Tensor]], ...] = (
        lambda: load(new, tmp_path),
        lambda: dict(open_checkpoint(tmp_path).tensors()),
        lambda: dict(stream_weights([str(tmp_path / "model-00001-of-00001.safetensors")], LoaderSettings())),
    )
    for read in reads:
        caplog.clear()
        assert same(new, read())
        assert f"does not name 1 files beside it that hold parts of tensors, such as {beside}" in caplog.text


TARGETS: dict[str, Callable[[], torch.Tensor]] = {
    "rows": lambda: torch.zeros(4, 5),
    "columns": lambda: torch.zeros(4, 9)[:, 2:7],
    "transposed": lambda: torch.zeros(5, 4).t(),
    "another type": lambda: torch.zeros(4, 5, dtype=torch.float64),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("columns", [(0, 5), (1, 3)])
def test_rows_of_several_ranks_are_planned_as_one_tensor(tmp_path, target: Callable[[], torch.Tensor], columns):
    whole = torch.arange(35.0).reshape(7, 5)
    for number, (first, end) in enumerate([(2, 3), (0, 2), (3, 7), (7, 7)], 1):
        part(tmp_path, number, {"a": whole[first:end].clone()}, at(first, 0))
    reader = dcp.HuggingFaceStorageReader(tmp_path)
    metadata = reader.read_metadata()
    stored = metadata.state_dict_metadata["a"]
    assert isinstance(stored, TensorStorageMetadata)
    assert [(chunk.offsets, chunk.sizes) for chunk in stored.chunks] == [((0, 0), (7, 5))]
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    # Of three ranks, this one gets a box of rows 1 to 4.
    begin, width = columns
    into = target()
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"a": into}, metadata, is_coordinator=True)
    index = MetadataIndex("a", (0, 0))
    box = (torch.Size((0, begin)), MetadataIndex("a", (0, 0)), torch.Size((1, begin)), torch.Size((4, width)))
    reader.read_data(LoadPlan([ReadItem(LoadItemType.TENSOR, index, *box)]), planner)
    expected = torch.zeros(4, 5)
    expected[:, begin : begin + width] = whole[1:5, begin : begin + width]
    assert torch.equal(into, expected.to(into.dtype))


def test_quantised_weights_are_not_handed_out_without_their_scales(tmp_path):
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    save_file({"l.weight": weight, "l.weight_scale_inv": torch.ones(1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointException, match=r"'l\.weight' is quantised.*QuantizedHuggingFaceStorageReader"):
        load({"l.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}, tmp_path)
    assert same({"l.weight": weight}, load({"l.weight": weight}, tmp_path))


def test_what_cannot_be_saved_is_told_before_anything_is_written(tmp_path):
    path = tmp_path / "c"
    for state, options, told in (
        ({"a": torch.ones(2), "step": 3}, {}, "'step' is not a tensor"),
        ({"a": torch.ones(2)}, {"fqn_to_index_mapping": {"b": 1}}, "fqn_to_index_mapping has None for 'a'"),
        ({"a": torch.ones(2)}, {"fqn_to_index_mapping": {"a": 0}}, "fqn_to_index_mapping has 0 for 'a'"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}, "which safetensors cannot hold"),
    ):
        with pytest.raises(CheckpointException, match=told):
            write(state, path, **options)
        assert not path.exists() or os.listdir(path) == []
    with pytest.raises(ValueError, match="thread_count_consolidation is 0"):
        dcp.HuggingFaceStorageWriter(path, thread_count_consolidation=0)


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path):
    state = {"a": torch.ones(3)}
    write(state, tmp_path)
    with pytest.raises(CheckpointException, match="which safetensors cannot hold"):
        write({"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.complex128)}, tmp_path)
    assert same(state, load(state, tmp_path))


def test_a_training_checkpoint_is_told_apart(tmp_path):
    torch_dcp.save({"a": torch.ones(2)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    with pytest.raises(CheckpointException, match=r"it has \.metadata: engine_loader\.dcp\.FileSystemReader reads it"):
        load({"a": torch.ones(2)}, tmp_path)


def test_files_go_by_the_mapping(saved_by_two):
    with open_checkpoint(saved_by_two / "ours-whole") as checkpoint:
        found = {name: Path(checkpoint.info(name).file).name for name in checkpoint}
    assert found == {name: f"model-{number:05}-of-00002.safetensors" for name, number in FILES.items()}
