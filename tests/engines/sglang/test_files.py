"""Of a model's files, those are read that SGLang's own loader reads: on its own classes, without an engine."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.sglang.conftest import VERSION
from tests.engines.sglang.serving import said

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

PT = {"format": "pt"}


def copy_of(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    return directory


def bare(model: Path, directory: Path) -> Path:
    """What a model has beside its weights."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("model*"))
    return directory


def test_the_files_are_those_of_sglangs_own_loader(llama: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for path in llama.glob("*.safetensors") for name, tensor in load_file(path).items()}
    another = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    shards = copy_of(llama, tmp_path / "shards")
    save_file(another, shards / "consolidated.safetensors", PT)
    save_file(another, shards / "old.safetensors", PT)
    (shards / "._model-00001-of-00003.safetensors").write_bytes(b"of another system")
    next_tokens = copy_of(llama, tmp_path / "next-tokens")
    save_file({"model.layers.2.norm.weight": torch.ones(3)}, next_tokens / "mtp.safetensors", PT)
    mistral = bare(llama, tmp_path / "mistral")
    save_file(tensors, mistral / "consolidated.safetensors", PT)
    pytorch = bare(llama, tmp_path / "pytorch")
    torch.save(tensors, pytorch / "pytorch_model.bin")

    sums = {name: tensor.float().sum().item() for name, tensor in tensors.items()}
    found = said(VERSION, "reading.py", shards, next_tokens, mistral, pytorch)
    assert len(found) == 4
    for directory, read in found.items():
        expected = sums | ({"model.layers.2.norm.weight": 3.0} if directory == str(next_tokens) else {})
        assert read["b10_3fs"] == read["auto"], directory
        assert read["auto"] == pytest.approx(expected, rel=1e-5), "a sum depends on the number of threads"
    assert found[str(mistral)]["asked"] == "mistral" or VERSION in ("0.5.9", "0.5.10", "0.5.11")
