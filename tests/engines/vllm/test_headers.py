"""What vLLM asks the weights' headers before it builds a model, where the weights are not in the model's directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import CheckpointError
from tests.support.tiny_models import make_model
from tests.support.training_checkpoints import copy_bare, trained
from tests.support.vllm_inprocess import differences, load_model, load_state, state_of

pytestmark = pytest.mark.engine

Tensors = dict[str, torch.Tensor]


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def head_of_its_own(directory: Path) -> Path:
    """The configuration says that the head is the embedding, and the checkpoint has another head."""
    model = make_model("llama", directory)
    change_config(model, tie_word_embeddings=True)
    return model


def half_precision(directory: Path) -> Path:
    """Weights in float16, and no dtype in the configuration."""
    model = make_model("llama", directory)
    change_config(model, dtype=None, torch_dtype=None)
    change_weights(model, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    return model


def partly_quantised(directory: Path, how: str) -> Path:
    """A layer that is not quantised, of which the configuration says nothing."""
    model = make_model(f"llama-{how}", directory)
    plain = load_file(make_model("llama", directory.parent / "plain") / "model.safetensors")
    layer = "model.layers.1.mlp.down_proj"

    def unpack(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{layer}.")}
        return kept | {f"{layer}.weight": plain[f"{layer}.weight"]}

    change_weights(model, unpack)
    return model


MODELS: dict[str, Callable[[Path], Path]] = {
    "head": head_of_its_own,
    "half": half_precision,
    "gptq": lambda directory: partly_quantised(directory, "gptq"),
    "awq": lambda directory: partly_quantised(directory, "awq"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_built_as_for_weights_in_its_own_directory(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind](tmp_path / "model")
    arguments = {"dtype": "bfloat16" if kind in ("gptq", "awq") else "auto"}
    expected = load_state(model, "auto", **arguments)[0]
    if kind == "head":
        assert not torch.equal(expected["lm_head.weight"], expected["model.embed_tokens.weight"])
    if kind == "half":
        assert expected["lm_head.weight"].dtype == torch.float16
    bare = copy_bare(model, tmp_path / "bare")
    in_training = trained(model, tmp_path / "trained", "fsdp", prefix="")
    for directory, options in (
        (bare, {"weights_uri": str(model)}),
        (bare, {"weights_uri": f"{in_training}/"}),
        (in_training, {}),
    ):
        for mode in ("direct", "stream"):
            state = load_state(directory, "b10_3fs", {"mode": mode, **options}, **arguments)[0]
            assert differences(expected, state) == []


def test_weights_in_the_models_directory_do_not_answer_for_those_at_weights_uri(tmp_path: Path) -> None:
    untied = head_of_its_own(tmp_path / "untied")
    tied = make_model("llama-tied", tmp_path / "tied")
    expected = load_state(tied, "auto")[0]
    assert differences(expected, load_state(untied, "b10_3fs", {"weights_uri": str(tied)})[0]) == []
    expected = load_state(untied, "auto")[0]
    assert differences(expected, load_state(tied, "b10_3fs", {"weights_uri": str(untied)})[0]) == []
    # Another load format looks into the model's own directory, after this as before.
    assert differences(load_state(tied, "auto")[0], state_of(load_model(tied, "safetensors"))) == []


def test_weights_that_cannot_be_read_are_named_before_the_model_is_built(tmp_path: Path) -> None:
    model = head_of_its_own(tmp_path / "model")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/weights/model.safetensors"):
        load_model(model, "b10_3fs", {"weights_uri": str(tmp_path / "weights")})
