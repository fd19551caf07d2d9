"""Weights in blocks through dcp.load: multiplied by their scales, as torch's reader does it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

from engine_loader import dcp
from engine_loader.formats.hf_index import INDEX_NAME

from .states import bits, same

ROWS, COLUMNS = 300, 200
GROUPS, BYTES = 6, 16


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    files = {
        "model-00001-of-00002.safetensors": {
            "a.weight": (torch.randn(ROWS, COLUMNS) * 50).to(torch.float8_e4m3fn),
            "norm.weight": torch.rand(7).bfloat16(),
            "experts_blocks": torch.randint(0, 256, (3, 4, GROUPS, BYTES), dtype=torch.uint8),
        },
        "model-00002-of-00002.safetensors": {
            "a.weight_scale_inv": torch.rand(3, 2),
            "experts_scales": torch.randint(118, 134, (3, 4, GROUPS), dtype=torch.uint8),
        },
    }
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def load(reader: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch_dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def targets(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.zeros(ROWS, COLUMNS, dtype=dtype), "norm.weight": torch.zeros(7, dtype=dtype)}


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [torch.float32, torch.bfloat16])
def test_weights_in_blocks_are_those_of_torchs_reader(model, wanted, rounded):
    expected = load(QuantizedHuggingFaceStorageReader(str(model), target_dtype=rounded), targets(wanted))
    found = load(dcp.QuantizedHuggingFaceStorageReader(model, target_dtype=rounded), targets(wanted))
    assert same(expected, found)
    assert found["a.weight"].float().std() > 10


def read_box(reader: Any, name: str, offsets: tuple[int, ...], lengths: tuple[int, ...], into: torch.Tensor) -> None:
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = DefaultLoadPlanner()
    planner.set_up_planner({name: into}, metadata, is_coordinator=True)
    zeros = torch.Size([0] * len(offsets))
    item = ReadItem(
        LoadItemType.TENSOR,
        MetadataIndex(name, zeros),
        zeros,
        MetadataIndex(name, zeros),
        torch.Size(offsets),
        torch.Size(lengths),
    )
    reader.read_data(LoadPlan([item]), planner)


@pytest.mark.parametrize(
    "box", [((0, 0), (1, 1)), ((100, 50), (150, 130)), ((128, 128), (128, 72)), ((299, 0), (1, 200))]
)
def test_a_rank_gets_its_part(model, box):
    whole = load(dcp.QuantizedHuggingFaceStorageReader(model), targets(torch.float32))["a.weight"]
    offsets, lengths = box
    into = torch.zeros(lengths)
    read_box(dcp.QuantizedHuggingFaceStorageReader(model), "a.weight", offsets, lengths, into)
    rows, columns = (slice(begin, begin + size) for begin, size in zip(offsets, lengths, strict=True))
    assert bits(into) == bits(whole[rows, columns].contiguous())


@pytest.mark.skipif(
    not hasattr(QuantizedHuggingFaceStorageReader, "_dequantize_tensor_mxfp4"), reason="torch's reader has no mxfp4"
)
@pytest.mark.parametrize(
    "box", [((0, 0, 0), (3, 4, GROUPS * BYTES * 2)), ((1, 2, 37), (2, 1, 100)), ((2, 0, 32), (1, 4, 32))]
)
def test_mxfp4_is_unpacked_as_torchs_reader_unpacks_it(model, box):
    blocks = load(dcp.HuggingFaceStorageReader(model), {"experts_blocks": torch.zeros(3, 4, GROUPS, BYTES).byte()})
    scales = load(dcp.HuggingFaceStorageReader(model), {"experts_scales": torch.zeros(3, 4, GROUPS).byte()})
    zeros, full = torch.Size([0, 0, 0]), torch.Size((3, 4, GROUPS * BYTES * 2))
    index = MetadataIndex("experts_blocks", zeros)
    request = ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, full)
    expected = QuantizedHuggingFaceStorageReader(str(model))._dequantize_tensor_mxfp4(
        blocks["experts_blocks"], scales["experts_scales"], request, 0, 0
    )
    offsets, lengths = box
    into = torch.zeros(lengths)
    read_box(dcp.QuantizedHuggingFaceStorageReader(model), "experts_blocks", offsets, lengths, into)
    part = tuple(slice(begin, begin + size) for begin, size in zip(offsets, lengths, strict=True))
    assert bits(into) == bits(expected[part].contiguous())
    whole = load(dcp.QuantizedHuggingFaceStorageReader(model), {"experts_blocks": torch.zeros(full)})
    assert bits(whole["experts_blocks"]) == bits(expected)


def test_scales_of_other_blocks_are_told(model):
    reader = dcp.QuantizedHuggingFaceStorageReader(model, block_size=64)
    with pytest.raises(CheckpointException, match=r"'a\.weight_scale_inv' are \[3, 2\].*not those of blocks of 64"):
        load(reader, targets(torch.float32))
    with pytest.raises(ValueError, match="block_size is 0"):
        dcp.QuantizedHuggingFaceStorageReader(model, block_size=0)
