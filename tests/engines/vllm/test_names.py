"""Names of a training checkpoint that are not the model's: the key_mapping that is suggested."""

import json
import re

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import nn

from engine_loader import CheckpointError
from engine_loader.engines.common.names import explaining_misfits, suggest_mapping
from engine_loader.loading.training.key_mapping import make_renamer
from engine_loader.settings import load_settings


class Attention(nn.Module):
    """As engines have it: one parameter for three of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(4, 12, bias=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.norm = nn.LayerNorm(4, bias=False)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()
        self.lm_head = nn.Linear(4, 8, bias=False)


NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.self_attn.{part}_proj.weight" for n in range(2) for part in "qkvo"),
    *(f"model.layers.{n}.norm.weight" for n in range(2)),
    "lm_head.weight",
]


def test_names_that_fit_need_none() -> None:
    assert suggest_mapping(NAMES, Model()) is None


@pytest.mark.parametrize(
    ("change", "suggested"),
    [
        (lambda name: f"model.{name}", {"^model[.]": ""}),
        (lambda name: f"module.{name}", {"^module[.]": ""}),
        (lambda name: f"app.state.net.{name}", {"^app[.]state[.]net[.]": ""}),
        (lambda name: f"my-net.{name}", {r"^my\-net[.]": ""}),
        (lambda name: f"_orig_mod.{name}", {"_orig_mod[.]": ""}),
        (lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"), None),
        (lambda name: re.sub(r"^", "model.", name).replace("layers.", "layers._orig_mod."), None),
        (lambda name: name.replace("model.", "transformer.", 1), {"^transformer[.]": "model."}),
        (lambda name: name.removeprefix("model."), {"^(?!(lm_head)[.])": "model."}),
    ],
)
def test_the_suggestion_makes_the_names_fit(change, suggested) -> None:
    changed = [change(name) for name in NAMES]
    mapping = suggest_mapping(changed, Model())
    if suggested is not None:
        assert mapping == suggested
    if mapping is not None:
        rename = make_renamer(mapping)
        assert [rename(name) for name in changed] == NAMES


def test_names_of_another_model_are_not_guessed_at() -> None:
    assert suggest_mapping([f"h.{number}.conv.weight" for number in range(9)], Model()) is None
    assert suggest_mapping([], Model()) is None
    assert suggest_mapping(NAMES, torch.nn.Module()) is None


def explained(path, engine_error: Exception, **options) -> None:
    """What a start of an engine ends with that fails to load a checkpoint."""
    state = {f"net.{name}": torch.zeros(1) for name in NAMES}
    state |= {"ema": torch.zeros(1), "net.teacher.w": torch.zeros(1), "net.teacher.v": torch.zeros(1)}
    torch_dcp.save(state, checkpoint_id=path, no_dist=True)
    settings = load_settings({"key_mapping": {"^net[.]": ""}} | options).settings.loader
    with explaining_misfits(Model(), str(path), settings):
        raise engine_error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("There is no module or parameter named 'ema' in Model"),
        ValueError("There is no module or parameter named 'teacher' in Model"),
        KeyError("teacher.v"),
    ],
    ids=str,
)
def test_names_that_the_model_does_not_have_are_left_out_by_the_mapping_that_is_suggested(tmp_path, error) -> None:
    with pytest.raises(CheckpointError, match=r"'ema'.*for which Model has no parameter; the engine said") as raised:
        explained(tmp_path / "c", error)
    hint = str(raised.value)
    mapping = json.loads(re.search(r"add to key_mapping: ({.*?})", hint)[1])
    assert mapping == {"^ema([.]|$)": None, "^net[.]teacher([.]|$)": None}
    rename = make_renamer(mapping | {"^net[.]": ""})
    assert [rename(f"net.{name}") for name in NAMES] == NAMES
    assert rename("ema") is rename("net.teacher.w") is rename("net.teacher.v") is None


def test_errors_about_something_else_are_left_as_they_are(tmp_path) -> None:
    with pytest.raises(ValueError, match="out of memory"):
        explained(tmp_path / "c", ValueError("out of memory for 'lm_head.weight'"))
    with pytest.raises(ValueError, match="'ema'"):
        explained(
            tmp_path / "d", ValueError("no parameter named 'ema'"), key_mapping={"ema|teacher": None, "^net[.]": ""}
        )
