"""vLLM: the files that its own loader would pick are picked, whatever lies beside them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import SettingsError
from tests.support.tiny_models import make_model
from tests.support.training_checkpoints import copy_bare
from tests.support.vllm_inprocess import State, differences, load_state

from .test_loader import make_loader, source_of

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def expected(llama: Path) -> State:
    return load_state(llama, "auto")[0]


def test_a_stale_copy_hidden_files_and_a_tensor_that_no_shard_has(llama: Path, expected: State, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    first, last = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
    name = next(name for name, shard in index["weight_map"].items() if shard == first)
    tensors = load_file(model / last)
    save_file({**tensors, name: torch.zeros_like(load_file(model / first)[name])}, model / last, {"format": "pt"})
    index["weight_map"]["mtp.fc.weight"] = first
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / f"._{first}").write_bytes(b"\0\5\x16\7 of another system")
    for mode in ("direct", "stream"):
        assert differences(expected, load_state(model, "b10_3fs", {"mode": mode})[0]) == []
        options = {"mode": mode, "weights_uri": str(model)}
        assert differences(expected, load_state(copy_bare(llama, tmp_path / mode), "b10_3fs", options)[0]) == []


def test_files_of_pytorch_are_read_by_vllms_own_reader(llama: Path, expected: State, tmp_path: Path) -> None:
    model = copy_bare(llama, tmp_path / "bin")
    tensors = {name: tensor for path in llama.glob("*.safetensors") for name, tensor in load_file(path).items()}
    torch.save(tensors, model / "pytorch_model.bin")
    for mode in ("direct", "stream"):
        assert differences(expected, load_state(model, "b10_3fs", {"mode": mode})[0]) == []


def test_a_draft_with_files_of_pytorch_keeps_its_own_weights(llama: Path, tmp_path: Path) -> None:
    draft = copy_bare(llama, tmp_path / "draft")
    config = SimpleNamespace(model=str(draft), revision=None, runner_type="draft")
    loader = make_loader(model_loader_extra_config={"weights_uri": str(llama)})
    torch.save({}, draft / "optimizer.pt")
    assert len(dict(loader.get_all_weights(config, torch.nn.Module()))) == 21  # its layers are among the target's
    torch.save({"own": torch.full((2,), 5.0)}, draft / "pytorch_model.bin")
    weights = dict(loader.get_all_weights(config, torch.nn.Module()))
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {"own": [5.0, 5.0]}


def test_other_heads_beside_safetensors_are_read_by_vllms_own_reader(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"weight": torch.full((2,), 3.0)}, tmp_path / "head.pt")
    head = source_of(tmp_path, prefix="head.", allow_patterns_overrides=["head.pt"])
    loader = make_loader()
    config = SimpleNamespace(model=str(tmp_path), revision=None)
    model = torch.nn.Module()
    model.secondary_weights = (head,)
    weights = dict(loader.get_all_weights(config, model))
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {"a": [1, 1], "head.weight": [3, 3]}


@pytest.mark.parametrize("uri", [True, False])
@pytest.mark.parametrize("config_format", ["auto", "hf", "mistral"])
def test_consolidated_files_are_taken_where_the_configuration_is_mistrals(
    uri: bool, config_format: str, tmp_path: Path
) -> None:
    save_file({"hf": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"mistral": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"hf": "model.safetensors"}}))
    loader = make_loader(model_loader_extra_config={"weights_uri": str(tmp_path)} if uri else {})
    config = SimpleNamespace(model=str(tmp_path), revision=None, config_format=config_format)
    names = [name for name, _ in loader.get_all_weights(config, torch.nn.Module())]
    assert names == (["hf"] if config_format == "hf" else ["mistral"])


def test_consolidated_files_of_a_folder_below_are_left_alone(tmp_path: Path) -> None:
    save_file({"hf": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "original").mkdir()
    save_file({"mistral": torch.ones(2)}, tmp_path / "original" / "consolidated.safetensors")
    (tmp_path / "original" / "params.json").write_text("{}")
    loader = make_loader()
    config = SimpleNamespace(model=str(tmp_path), revision=None, config_format="auto")
    assert [name for name, _ in loader.get_all_weights(config, torch.nn.Module())] == ["hf"]


def test_a_torchao_checkpoint_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader import default_loader

    make_model("llama", tmp_path / "weights")
    asked = []
    monkeypatch.setattr(
        default_loader, "safetensors_weights_iterator", lambda *args: asked.append(args) or iter([("theirs", None)])
    )
    loader = make_loader()
    loader.load_config.safetensors_load_strategy = "torchao"
    loader._replaced = ("name", str(tmp_path / "weights"))
    assert list(loader._get_weights_iterator(source_of(Path("name")))) == [("theirs", None)]
    assert asked == [([str(tmp_path / "weights" / "model.safetensors")], True, "torchao")]
    from engine_loader.engines.vllm import loader as module

    monkeypatch.setattr(module, "weights_at", lambda uri, *_, **__: [f"{uri}/model.safetensors"])
    loader._replaced = ("name", "s3://bucket/weights")
    with pytest.raises(SettingsError, match=r"s3://bucket/weights has a torchao checkpoint.*copy it"):
        loader._get_weights_iterator(source_of(Path("name")))
