"""Tensors that are saved as something else than their elements: the class is named, and what to do."""

import io

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException

from engine_loader import CheckpointError, dcp, open_checkpoint
from engine_loader.conversion import convert_checkpoint
from engine_loader.loading.training.torch_load import load_item

from .odd_tensors import Named
from .states import load, save, stock_save

PLAIN = torch.arange(16.0).reshape(4, 4)
QUANTISED = {
    "per tensor": torch.quantize_per_tensor(PLAIN, 0.25, 0, torch.qint8),
    "per channel": torch.quantize_per_channel(PLAIN, torch.ones(4), torch.zeros(4), 0, torch.quint8),
}


def ways(path, tmp_path) -> dict:
    """Every way to read "w" out of a checkpoint."""

    def opened(read):
        with open_checkpoint(path) as checkpoint:
            return read(checkpoint)

    return {
        "get_tensor": lambda: opened(lambda checkpoint: checkpoint.get_tensor("w")),
        "get_slice": lambda: opened(lambda checkpoint: checkpoint.get_slice("w")[1:3]),
        "load_into": lambda: opened(lambda checkpoint: checkpoint.load_into({"w": torch.zeros(4, 4)})),
        "tensors": lambda: opened(lambda checkpoint: dict(checkpoint.tensors())),
        "convert to safetensors": lambda: convert_checkpoint(str(path), str(tmp_path / "hf")),
        "convert to dcp": lambda: convert_checkpoint(str(path), str(tmp_path / "dcp"), to="dcp"),
        "dcp.load": lambda: load({"w": torch.zeros(4, 4)}, path),
    }


WAYS = list(ways("", None))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saved", [save, stock_save])
def test_a_subclass_is_named_with_what_to_do(tmp_path, saved, way):
    path = saved({"w": Named(PLAIN), "v": torch.ones(2)}, tmp_path / "c")
    with pytest.raises((CheckpointError, CheckpointException)) as raised:
        ways(path, tmp_path)[way]()
    said = str(raised.value)
    assert "'w' was saved as a tensor of tests.dcp.odd_tensors.Named" in said
    assert "save it as a plain tensor: dequantize() of a quantised one" in said
    assert "\x1b" not in said
    assert "copy the checkpoint again" not in said
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.get_tensor("v"), torch.ones(2))


def test_a_class_that_is_trusted_is_read_as_a_plain_tensor(tmp_path):
    path = save({"w": Named(PLAIN)}, tmp_path / "c")
    with torch.serialization.safe_globals([Named]):
        with open_checkpoint(path) as checkpoint:
            read = checkpoint.get_tensor("w")
        assert type(read) is torch.Tensor
        assert torch.equal(read, PLAIN)
        assert torch.equal(load({"w": torch.zeros(4, 4)}, path)["w"], PLAIN)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_tensor_is_named_with_what_to_do(tmp_path, kind, way):
    tensor = QUANTISED[kind]
    path = stock_save({"w": tensor, "v": torch.ones(2)}, tmp_path / "c")
    with pytest.raises((CheckpointError, CheckpointException)) as raised:
        ways(path, tmp_path)[way]()
    said = str(raised.value)
    assert f"'w' is a quantised tensor of torch ({tensor.dtype})" in said
    assert "save its dequantize(), or its int_repr() and its scales" in said
    assert "INTERNAL ASSERT" not in said
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "dcp").exists()


def test_a_quantised_tensor_can_be_left_out(tmp_path):
    path = stock_save({"w": QUANTISED["per tensor"], "v": torch.ones(2)}, tmp_path / "c")
    with open_checkpoint(path, key_mapping={"^w$": None}) as checkpoint:
        assert {name: tensor.tolist() for name, tensor in checkpoint.tensors()} == {"v": [1, 1]}


def test_a_quantised_tensor_is_loaded_into_one(tmp_path):
    path = stock_save({"w": QUANTISED["per tensor"]}, tmp_path / "c")
    target = torch.quantize_per_tensor(torch.zeros(4, 4), 0.25, 0, torch.qint8)
    assert torch.equal(load({"w": target}, path)["w"].dequantize(), PLAIN)


def test_a_damaged_item_is_told_in_one_line_without_terminal_codes(tmp_path):
    stored = io.BytesIO()
    torch.save(PLAIN, stored)
    for content in (b"", b"junk" * 20, stored.getvalue()[:200], b"\x80\x05\x95" + bytes(40)):
        with pytest.raises(
            CheckpointError, match=r"'w' cannot be read as a tensor: .*copy the checkpoint again"
        ) as raised:
            load_item(content, "w", "file", 0)
        assert "\x1b" not in str(raised.value)
        assert "\n" not in str(raised.value)
        assert "two options" not in str(raised.value)


def test_values_that_are_refused_are_named(tmp_path):
    path = save({"w": PLAIN, "value": Named}, tmp_path / "c")
    with pytest.raises(CheckpointException) as raised:
        torch_dcp.load({"value": None}, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert "refuses it: Unsupported global: GLOBAL tests.dcp.odd_tensors.Named was not an allowed" in str(raised.value)
    assert "\x1b" not in str(raised.value)
