"""safe_open as transformers, diffusers and accelerate call it, alone and under from_pretrained."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
import transformers.modeling_utils
from safetensors.torch import save_file

import engine_loader
from engine_loader import CheckpointError
from engine_loader.compat import safetensors_files
from engine_loader.compat.safetensors_files import load_file

TENSORS = {
    "b": torch.arange(60.0).reshape(5, 12),
    "a": torch.arange(7, dtype=torch.bfloat16),
    "s": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_it_answers_as_safetensors_does(path: Path) -> None:
    with (
        engine_loader.safe_open(path, framework="pt", device="cpu", backend="pread") as ours,
        safetensors.safe_open(path, framework="pt", device="cpu") as theirs,
    ):
        assert list(ours.keys()) == list(theirs.keys())
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata() == {"format": "pt"}
        for name in theirs.keys():  # noqa: SIM118 - it is no dictionary
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name))
            mine, their = ours.get_slice(name), theirs.get_slice(name)
            assert (mine.get_shape(), mine.get_dtype()) == (their.get_shape(), their.get_dtype())
            assert torch.equal(mine[...], their[...])
        for index in ((slice(1, 3), slice(None, None, 2)), 2, (slice(None), [0, 2]), -1, None):
            assert torch.equal(ours.get_slice("b")[index], theirs.get_slice("b")[index])
        for index in (5, (0, 12), (0, 0, 0)):
            for file in (ours, theirs):
                with pytest.raises(IndexError):
                    file.get_slice("b")[index]
        assert {name: tensor.tolist() for name, tensor in ours.get_tensors().items()} == {
            name: tensor.tolist() for name, tensor in theirs.get_tensors().items()
        }
        with pytest.raises(KeyError, match="no tensor named 'c'"):
            ours.get_tensor("c")


def test_a_file_without_metadata(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    with engine_loader.safe_open(str(tmp_path / "m.safetensors"), "pt") as file:
        assert file.metadata() is None


def test_after_the_block_it_is_closed(path: Path) -> None:
    with engine_loader.safe_open(path, "pt") as file:
        part = file.get_slice("b")
    for call in (file.keys, file.metadata, file.offset_keys, lambda: file.get_tensor("a")):
        with pytest.raises(CheckpointError, match="File is closed"):
            call()
    with pytest.raises(CheckpointError):
        part[0]
    file.__exit__(None, None, None)


def test_what_cannot_be_opened(tmp_path: Path, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        engine_loader.safe_open(tmp_path / "none", "pt")
    with pytest.raises(ValueError, match="framework is 'numpy'"):
        engine_loader.safe_open(path, "numpy")
    with pytest.raises(ValueError, match="backend is 'io_uring'"):
        engine_loader.safe_open(path, "pt", backend="io_uring")
    (tmp_path / "bad").write_bytes(b"0123456789")
    with pytest.raises(CheckpointError):
        engine_loader.safe_open(tmp_path / "bad", "pt")


def test_load_file_reads_all(path: Path) -> None:
    loaded = load_file(path, device="cpu")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


BLOCK = 128  # rows and columns of a weight that share a scale
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3_moe": {**SMALL, "moe_intermediate_size": 32, "num_experts": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    "bert": {**SMALL, "intermediate_size": 64},
    "gemma2": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **CONFIGS[request.param])
    directory = tmp_path_factory.mktemp(request.param)
    transformers.AutoModel.from_config(config).save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the files that our safe_open opened."""
    names: list[str] = []
    begin = safetensors_files.safe_open.__init__

    def noting(self: Any, filename: Any, *args: Any, **options: Any) -> None:
        names.append(Path(filename).name)
        begin(self, filename, *args, **options)

    monkeypatch.setattr(safetensors_files.safe_open, "__init__", noting)
    yield names


def test_under_from_pretrained(model: Path, opened: list[str]) -> None:
    plain = transformers.AutoModel.from_pretrained(model).state_dict()
    assert opened == []
    with engine_loader.replacing_safetensors("transformers"):
        ours = transformers.AutoModel.from_pretrained(model).state_dict()
    assert set(opened) == {path.name for path in model.glob("*.safetensors")}
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    assert transformers.modeling_utils.safe_open is safetensors.safe_open


def quantised_llama(directory: Path) -> dict[str, torch.Tensor]:
    """A tiny model with fine-grained FP8 weights in two shards; returns what its weights were before."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", **{**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 256}
    )
    state = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).state_dict()
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stored[name] = tensor
        if "_proj" in name:
            blocks = tensor.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            quantised = blocks / scales[:, None, :, None]
            stored[name] = quantised.reshape(tensor.shape).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
    names = list(stored)
    files = {name: f"model-{1 + 2 * at // len(names):05}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: stored[name] for name in names if files[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    quantisation = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    described = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantisation}
    (directory / "config.json").write_text(json.dumps(described))
    return state


def test_quantised_weights_under_from_pretrained(tmp_path: Path, opened: list[str]) -> None:
    before = quantised_llama(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert opened == []
    with engine_loader.replacing_safetensors("transformers"):
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert set(opened) == {path.name for path in tmp_path.glob("*.safetensors")}
    assert ours.keys() == plain.keys() == before.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    for name, tensor in before.items():  # on a CPU transformers multiplies by the scales
        torch.testing.assert_close(ours[name], tensor, atol=0.01, rtol=0.1)


def test_it_is_put_back_after_a_failure() -> None:
    with pytest.raises(RuntimeError, match="within"), engine_loader.replacing_safetensors("transformers"):
        assert transformers.modeling_utils.safe_open is engine_loader.safe_open
        assert safetensors.safe_open is not engine_loader.safe_open
        raise RuntimeError("within")
    assert transformers.modeling_utils.safe_open is safetensors.safe_open
    with pytest.raises(ImportError), engine_loader.replacing_safetensors("no_such_library"):
        pass
