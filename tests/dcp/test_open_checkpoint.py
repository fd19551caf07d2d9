"""``open_checkpoint`` of a training's checkpoint: whole tensors, by the engine's names."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from engine_loader import CheckpointError, TensorNotFoundError, open_checkpoint
from engine_loader.dcp import SerializationFormat
from engine_loader.report.load_report import LoadReport
from tests.support.resources import left_open, open_resources

from .states import same, save, stock_save, training_state


def sharded(directory: Path, whole: torch.Tensor, cuts: list[tuple[tuple[int, int], tuple[int, int]]]) -> Path:
    """A checkpoint of one tensor, "model.w", with a chunk for each (offsets, sizes), each in a file of its own."""
    directory.mkdir()
    chunks, places = [], {}
    for number, (offsets, sizes) in enumerate(cuts):
        name = f"__{number}_0.distcp"
        part = whole[offsets[0] : offsets[0] + sizes[0], offsets[1] : offsets[1] + sizes[1]].contiguous()
        torch.save(part, directory / name)
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        place = _StorageInfo(name, 0, (directory / name).stat().st_size)
        places[MetadataIndex("model.w", offsets, number)] = place
    entry = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata({"model.w": entry}, None, places)))
    return directory


WHOLE = torch.arange(7 * 12, dtype=torch.float32).reshape(7, 12)
CUTS = {
    "one": [((0, 0), (7, 12))],
    "rows": [((0, 0), (3, 12)), ((3, 0), (4, 12))],
    "columns": [((0, 8), (7, 4)), ((0, 0), (7, 8))],
    "grid": [((0, 0), (4, 5)), ((0, 5), (4, 7)), ((4, 0), (3, 5)), ((4, 5), (3, 7))],
}


@pytest.fixture(params=CUTS)
def checkpoint(request, tmp_path):
    with open_checkpoint(sharded(tmp_path / "c", WHOLE, CUTS[request.param])) as checkpoint:
        yield checkpoint


@pytest.mark.parametrize("options", [{}, {"serialization_format": SerializationFormat.SAFETENSORS}])
def test_a_training_is_opened_without_its_optimizer(tmp_path, options):
    state = training_state()
    del state["kinds"]["torch.complex64"]
    save(state, tmp_path / "c", thread_count=2, **options)
    with open_checkpoint(tmp_path / "c") as checkpoint:
        names = checkpoint.keys()
        read = dict(checkpoint.tensors())
        assert set(names) == set(read)
        assert not any("optimizer" in name for name in names)
        for name, tensor in state["model"].items():
            assert same(read[f"model.{name}"], tensor)
            assert checkpoint.info(f"model.{name}").shape == tensor.shape
        for name, tensor in state["kinds"].items():
            assert same(read[f"kinds.{name}"], tensor)
        assert same(read["list.2.transposed"], state["list"][2]["transposed"])
    with open_checkpoint(tmp_path / "c", optimizer_state=True) as checkpoint:
        assert same(checkpoint.get_tensor("optimizer.state.0.exp_avg"), state["optimizer"]["state"][0]["exp_avg"])


def test_what_torch_wrote_is_opened(tmp_path):
    state = training_state()
    stock_save(state, tmp_path / "c")
    with open_checkpoint(tmp_path / "c", key_mapping={"^model[.]": ""}) as checkpoint:
        assert same(
            dict(checkpoint.tensors(state["model"])), {name: state["model"][name] for name in checkpoint.keys()[:4]}
        )
        assert checkpoint.info("0.weight").dtype == "F32"


def test_chunks_are_put_together(checkpoint):
    assert same(checkpoint.get_tensor("model.w"), WHOLE)
    assert same(dict(checkpoint.tensors()), {"model.w": WHOLE})
    info = checkpoint.info("model.w")
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (7, 12), WHOLE.nbytes)
    assert os.path.basename(info.file) == "__0_0.distcp"


INDICES = [
    (2,),
    (slice(1, 6),),
    (slice(None), 5),
    (slice(2, 7, 2), slice(3, None, 4)),
    (..., -1),
    (-1, ...),
    (None, slice(3, 4), None, slice(5, 1)),
    ([0, 3, 3], slice(2, 8)),
    (torch.tensor([True, False, True, False, False, True, True]),),
    (3, 4),
    (slice(10, 20),),
    (True,),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_means_what_it_means_in_torch(checkpoint, index):
    assert same(checkpoint.get_slice("model.w")[index], WHOLE[index])


@pytest.mark.parametrize("index", [(7,), (0, 0, 0), (slice(None, None, -1),), (0, -13)])
def test_a_wrong_index_is_torch_s_error(checkpoint, index):
    with pytest.raises((IndexError, ValueError)):
        checkpoint.get_slice("model.w")[index]


def test_targets_of_any_strides_are_filled(checkpoint):
    for target in (torch.zeros(7, 12), torch.zeros(12, 7).t(), torch.zeros(7, 24)[:, ::2]):
        report = LoadReport()
        checkpoint.load_into({"model.w": target}, report=report)
        assert torch.equal(target, WHOLE)
        assert report.tensors == 1
    with pytest.raises(CheckpointError, match=r"'model.w' is torch.float32 \[7, 12\], the target is torch.float64"):
        checkpoint.load_into({"model.w": torch.zeros(7, 12, dtype=torch.float64)})


def test_a_name_that_is_not_there_is_told(checkpoint):
    with pytest.raises(TensorNotFoundError, match=r"did you mean 'model.w'"):
        checkpoint.get_tensor("model.v")


def test_only_the_bytes_of_a_slice_are_read(tmp_path):
    whole = torch.zeros(1000, 50_000, dtype=torch.uint8)
    path = sharded(tmp_path / "c", whole, [((0, 0), (500, 50_000)), ((500, 0), (500, 50_000))])
    with open_checkpoint(path) as checkpoint:
        checkpoint.get_slice("model.w")[499:502]
        report = LoadReport()
        checkpoint.load_into({}, report=report)
    assert 150_000 <= report.bytes_read < 250_000


@pytest.mark.parametrize("index", [[3, 501, 997], torch.arange(1000) % 334 == 3], ids=["list", "mask"])
def test_only_the_rows_of_a_list_or_a_mask_are_read(tmp_path, index):
    whole = torch.arange(1000, dtype=torch.int32)[:, None].expand(1000, 50_000).to(torch.uint8)
    path = sharded(tmp_path / "c", whole, [((0, 0), (500, 50_000)), ((500, 0), (500, 50_000))])
    with open_checkpoint(path) as checkpoint:
        rows = checkpoint.get_slice("model.w")[index]
        report = LoadReport()
        checkpoint.load_into({}, report=report)
    assert same(rows, whole[index])
    assert 150_000 <= report.bytes_read < 250_000


def test_it_is_opened_from_memory(tmp_path):
    path = sharded(tmp_path / "c", WHOLE, CUTS["grid"])
    files = {f"c/{file.name}": file.read_bytes() for file in path.iterdir()}
    with open_checkpoint("c", files=files) as checkpoint:
        assert same(dict(checkpoint.tensors()), {"model.w": WHOLE})


def test_names_are_mapped_as_transformers_does(tmp_path):
    state = {"net": {"layers": {"0": {"w": torch.zeros(2)}}, "head": {"w": torch.ones(3)}}, "ema": torch.zeros(1)}
    save(state, tmp_path / "c")
    mapping = {r"^net\.layers\.(\d+)": r"model.blocks.\1", r"^net\.": "lm.", "w$": "weight"}
    with open_checkpoint(tmp_path / "c", key_mapping=mapping) as checkpoint:
        assert sorted(checkpoint.keys()) == ["ema", "lm.head.w", "model.blocks.0.w"]
        assert same(checkpoint.get_tensor("lm.head.w"), torch.ones(3))


@pytest.mark.parametrize(
    ("mapping", "told"),
    [
        ({".+": "same"}, "both become 'same'"),
        ({"(": ""}, "is not a regular expression"),
        ({"a": r"\3"}, "not a replacement"),
    ],
)
def test_a_wrong_mapping_is_told(tmp_path, mapping, told):
    save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "c")
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(tmp_path / "c", key_mapping=mapping)


def test_names_are_mapped_by_a_function_or_by_the_setting(tmp_path, monkeypatch):
    save({"net": {"w": torch.zeros(2)}, "ema": torch.zeros(1)}, tmp_path / "c")
    with open_checkpoint(
        tmp_path / "c", key_mapping=lambda name: None if name == "ema" else name.upper()
    ) as checkpoint:
        assert checkpoint.keys() == ["NET.W"]
    monkeypatch.setenv("ENGINE_LOADER_LOADER__KEY_MAPPING", '{"^net[.]": ""}')
    with open_checkpoint(tmp_path / "c") as checkpoint:
        assert sorted(checkpoint.keys()) == ["ema", "w"]
    with open_checkpoint(tmp_path / "c", key_mapping={}) as checkpoint:
        assert sorted(checkpoint.keys()) == ["ema", "net.w"]


@pytest.mark.parametrize("which", [{"rank": 0}, {"rank": 1}, {"pipeline_rank": 1}])
def test_there_are_no_ranks_to_choose_from(tmp_path, which):
    save({"a": torch.zeros(2)}, tmp_path / "c")
    before = open_resources()
    with pytest.raises(CheckpointError, match=r"training checkpoint, .*no ranks to choose from .*get_slice"):
        open_checkpoint(tmp_path / "c", **which)
    assert left_open(before) == []


def test_a_mapping_of_what_is_no_training_is_told(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="go with a DCP directory"):
        open_checkpoint(tmp_path, key_mapping={"a": "b"})


@pytest.mark.parametrize("cuts", [CUTS["rows"][:1], [CUTS["rows"][0], ((2, 0), (4, 12))]])
def test_a_hole_in_a_tensor_is_told(tmp_path, cuts):
    with pytest.raises(CheckpointError, match="are not the whole tensor"):
        open_checkpoint(sharded(tmp_path / "c", WHOLE, cuts))


def test_a_file_of_another_save_is_told(tmp_path):
    path = sharded(tmp_path / "c", WHOLE, CUTS["rows"])
    size = (path / "__0_0.distcp").stat().st_size
    torch.save(torch.zeros(6, 6), path / "__0_0.distcp")
    with (path / "__0_0.distcp").open("ab") as file:
        file.write(bytes(max(0, size - file.tell())))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"__0_0.distcp"):
        checkpoint.get_tensor("model.w")


def test_a_file_that_was_cut_short_is_told(tmp_path):
    path = sharded(tmp_path / "c", WHOLE, CUTS["rows"])
    os.truncate(path / "__1_0.distcp", 900)
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="but the file ends after 900"):
        checkpoint.get_tensor("model.w")


def test_transformed_items_are_told(tmp_path):
    save({"a": torch.zeros(3)}, tmp_path / "c", _extensions=[ZStandard()])
    with open_checkpoint(tmp_path / "c") as checkpoint, pytest.raises(CheckpointError, match="was transformed when"):
        checkpoint.get_tensor("a")


def test_what_is_handed_out_stays_and_nothing_stays_open(tmp_path):
    state = {f"t{number}": torch.full((1000,), float(number)) for number in range(50)}
    save(state, tmp_path / "c")
    before = open_resources()
    with open_checkpoint(tmp_path / "c", buffer_bytes="1MiB") as checkpoint:
        read = dict(checkpoint.tensors())
        for _ in checkpoint.tensors():
            break
    assert same(read, state)
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.get_tensor("t0")
    assert left_open(before) == []
