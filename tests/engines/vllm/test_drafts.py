"""Draft models: one with a directory of its own keeps its weights, one that is a part of the model that it serves gets
them from where that model's are, whatever ``weights_uri`` says.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.architectures.inverting import checkpoint_of
from tests.support.tiny_models import make_model
from tests.support.training_checkpoints import copy_bare
from tests.support.vllm_inprocess import State, differences, load_model, state_of

from .test_reload import unpacked

pytestmark = pytest.mark.engine

MODES = ["direct", "stream"]
OWN = {"method": "eagle", "num_speculative_tokens": 1}
PART = {"method": "mtp", "num_speculative_tokens": 1}


def load_draft(
    target: Path, draft: Mapping[str, Any], load_format: str, options: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """The draft model beside ``target``, as vLLM's proposer loads it."""
    return load_model(target, load_format, options, of_draft=True, speculative_config=dict(draft))


def state_of_draft(target: Path, draft: Mapping[str, Any], mode: str, **options: Any) -> State:
    return state_of(load_draft(target, draft, "b10_3fs", {"mode": mode, **options}))


@pytest.fixture(scope="module")
def eagle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_bare(llama, tmp_path_factory.mktemp("eagle") / "draft")
    model = load_draft(llama, {"model": str(directory), **OWN}, "dummy")
    save_file(checkpoint_of(model), directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("mode", MODES)
def test_a_draft_with_weights_of_its_own(mode: str, llama: Path, eagle: Path, tmp_path: Path) -> None:
    draft = {"model": str(eagle), **OWN}
    expected = state_of(load_draft(llama, draft, "auto"))
    assert differences(expected, state_of_draft(llama, draft, mode)) == []
    bare = copy_bare(llama, tmp_path / "bare")
    assert differences(expected, state_of_draft(bare, draft, mode, weights_uri=str(llama))) == []
    # Its weights, too, can lie elsewhere: by a load configuration of its own.
    bare_draft = copy_bare(eagle, tmp_path / "draft")
    shutil.copytree(eagle, tmp_path / "weights")
    (stale := load_file(eagle / "model.safetensors")).update({name: torch.zeros_like(t) for name, t in stale.items()})
    save_file(stale, bare_draft / "model.safetensors", {"format": "pt"})
    own = {"load_format": "b10_3fs", "model_loader_extra_config": {"weights_uri": str(tmp_path / "weights")}}
    elsewhere = {"model": str(bare_draft), "draft_load_config": own, **OWN}
    assert differences(expected, state_of_draft(llama, elsewhere, mode)) == []


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a layer that predicts a second token, which transformers leaves out."""
    directory = make_model("deepseek-v3", tmp_path_factory.mktemp("deepseek"), num_nextn_predict_layers=1)
    tensors = load_file(directory / "model.safetensors")
    tensors |= checkpoint_of(load_draft(directory, PART, "dummy"))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("mode", MODES)
def test_a_draft_that_is_a_part_of_its_target(mode: str, deepseek: Path, tmp_path: Path) -> None:
    expected = state_of(load_draft(deepseek, PART, "auto"))
    assert differences(expected, state_of_draft(deepseek, PART, mode)) == []
    bare = copy_bare(deepseek, tmp_path / "bare")
    assert differences(expected, state_of_draft(bare, PART, mode, weights_uri=str(deepseek))) == []
    stale = {name: torch.zeros_like(t) for name, t in load_file(deepseek / "model.safetensors").items()}
    save_file(stale, bare / "model.safetensors", {"format": "pt"})
    assert differences(expected, state_of_draft(bare, PART, mode, weights_uri=str(deepseek))) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_draft_takes_weights_from_memory_as_one_that_vllm_loaded(mode: str, llama: Path, eagle: Path) -> None:
    """vLLM reloads no draft from disk: a trainer may hand it new weights (start_draft_weight_update)."""
    draft = {"model": str(eagle), **OWN}
    handed_over = {
        name: tensor.neg() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(eagle / "model.safetensors").items()
    }
    with unpacked():
        expected = handed(load_draft(llama, draft, "auto"), handed_over)
        assert differences(expected, state_of(load_draft(llama, draft, "auto"))) != []
        found = handed(load_draft(llama, draft, "b10_3fs", {"mode": mode}), handed_over)
    assert differences(expected, found) == []


def handed(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> State:
    """What a draft holds when vLLM has laid ``tensors`` over its weights, layer by layer."""
    from vllm.config import ModelConfig
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    config = mock.Mock(spec=ModelConfig, dtype=torch.bfloat16)
    with torch.inference_mode():
        initialize_layerwise_reload(model)
        model.load_weights(iter(tensors.items()))
        finalize_layerwise_reload(model, config)
    return state_of(model)
