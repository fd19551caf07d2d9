"""Rules in key_mapping: what they make of tensors, by value, and what is told of those that make no sense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_loader import CheckpointError, SettingsError, open_checkpoint
from engine_loader.conversion import convert_checkpoint
from engine_loader.loading.find import TrainingCheckpoint
from engine_loader.loading.mapping.rules import parse_rules
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings

from .states import same, save

STATE = {
    "blocks.0.qkv.weight": torch.arange(72.0).reshape(12, 6),
    "blocks.0.gate": torch.arange(12.0).reshape(4, 3),
    "blocks.0.up": torch.arange(12.0, 24).reshape(4, 3),
    "blocks.0.experts.w": torch.arange(24.0).reshape(3, 4, 2),
    "blocks.0.head.1": torch.full((2, 2), 1.0),
    "blocks.0.head.0": torch.full((2, 2), 0.0),
    "blocks.0.rotated": torch.arange(8.0).bfloat16(),
    "blocks.0.old": torch.ones(3),
    "scalar": torch.tensor(3.0),
    "kept": torch.arange(5),
}
RULES: list[dict[str, Any]] = [
    {"from": "blocks.{b}.qkv.{w}", "to": ["l.{b}.q.{w}", "l.{b}.k.{w}", "l.{b}.v.{w}"], "split": 0},
    {"from": ["blocks.{b}.up", "blocks.{b}.gate"], "to": "l.{b}.gate_up", "join": -1, "transpose": True},
    {"from": "blocks.{b}.experts.w", "to": "l.{b}.experts.{e}.w", "unstack": True, "transpose": True},
    {"from": "blocks.{b}.head.{n}", "to": "l.{b}.heads", "stack": True},
    {"from": "blocks.{b}.rotated", "to": "l.{b}.r", "rows": "pairs_to_halves", "head_dim": 4},
    {"from": "blocks.{b}.old", "to": None},
    {"from": "scalar", "to": "number"},
]


def expected() -> dict[str, torch.Tensor]:
    q, k, v = STATE["blocks.0.qkv.weight"].chunk(3)
    experts = STATE["blocks.0.experts.w"].transpose(1, 2)
    return {
        **{"l.0.q.weight": q, "l.0.k.weight": k, "l.0.v.weight": v},
        "l.0.gate_up": torch.cat([STATE["blocks.0.up"].T, STATE["blocks.0.gate"].T], dim=-1),
        **{f"l.0.experts.{number}.w": expert for number, expert in enumerate(experts)},
        "l.0.heads": torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]),
        "l.0.r": STATE["blocks.0.rotated"][[0, 2, 1, 3, 4, 6, 5, 7]],
        "number": STATE["scalar"],
        "kept": STATE["kept"],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(STATE, tmp_path / "c")


def test_every_way_of_reading_gives_what_the_rules_say(path):
    with open_checkpoint(path, key_mapping=RULES) as checkpoint:
        assert same(expected(), dict(checkpoint.tensors()))
        for name, tensor in expected().items():
            assert torch.equal(checkpoint.get_tensor(name), tensor), name
        assert torch.equal(checkpoint.get_slice("l.0.gate_up")[1:, 2:5], expected()["l.0.gate_up"][1:, 2:5])
        targets = {name: torch.zeros_like(tensor.contiguous()) for name, tensor in expected().items()}
        checkpoint.load_into(targets)
        assert same({name: tensor.contiguous() for name, tensor in expected().items()}, targets)
        names = list(reversed(expected()))
        assert [name for name, _ in checkpoint.tensors(names)] == [name for name in checkpoint if name in names]
    settings = load_settings({"key_mapping": json.dumps(RULES)}).settings.loader
    assert same(expected(), dict(stream_weights(TrainingCheckpoint(str(path)), settings)))


def test_a_conversion_takes_them_and_their_inverse_leads_back(path, tmp_path):
    convert_checkpoint(str(path), str(tmp_path / "model"), key_mapping=RULES)
    inverse = [
        {"from": ["l.{b}.q.{w}", "l.{b}.k.{w}", "l.{b}.v.{w}"], "to": "blocks.{b}.qkv.{w}", "join": 0},
        {"from": "l.{b}.gate_up", "to": ["blocks.{b}.up", "blocks.{b}.gate"], "split": -1, "transpose": True},
        {"from": "l.{b}.experts.{e}.w", "to": "blocks.{b}.experts.w", "stack": True, "transpose": True},
        {"from": "l.{b}.heads", "to": "blocks.{b}.head.{n}", "unstack": True},
        {"from": "l.{b}.r", "to": "blocks.{b}.rotated", "rows": "halves_to_pairs", "head_dim": 4},
        {"from": "number", "to": "scalar"},
    ]
    assert [rule.inverse() for rule in parse_rules(RULES) if rule.target] == parse_rules(inverse)
    convert_checkpoint(str(tmp_path / "model"), str(tmp_path / "back"), to="dcp", key_mapping=inverse)
    with open_checkpoint(tmp_path / "back", optimizer_state=True) as checkpoint:
        assert same({name: STATE[name] for name in STATE if name != "blocks.0.old"}, dict(checkpoint.tensors()))


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"from": "a"}, "it takes from, to"),
        ({"from": "a", "to": "b", "rotate": 1}, r"has \['rotate'\]; known are"),
        ({"from": "a", "to": "b", "rows": "halves"}, "rows is 'halves'"),
        ({"from": "a", "to": "b", "rows": "pairs_to_halves"}, "rows needs head_dim"),
        ({"from": "a", "to": "b", "rows": "pairs_to_halves", "head_dim": 3}, "rows needs head_dim"),
        ({"from": "a", "to": ["b", "c"], "split": 0, "stack": True}, "has split and stack; it takes one"),
        ({"from": "a", "to": ["b", "c"], "split": "0"}, "split is '0'"),
        ({"from": "a", "to": ["b", "c"]}, "takes one name in to"),
        ({"from": ["a", "c"], "to": "b"}, "takes one name in from"),
        ({"from": "a", "to": "b", "split": 1}, "split takes at least two names in to"),
        ({"from": "a.{n}", "to": "b"}, "every name must have the same"),
        ({"from": "a", "to": "b", "stack": True}, "takes one {place} more"),
        ({"from": "a", "to": None, "transpose": True}, "takes one name in to"),
        ({"from": "a", "to": "b", "transpose": 1}, "transpose is 1"),
        ({"from": "a{", "to": "b"}, "is no name with"),
        ({"from": "a.{n}.{n}", "to": "b.{n}"}, "is no name with"),
        ({"from": [], "to": "b"}, "is neither a name nor a list of names"),
        ("a", "it takes from, to"),
    ],
)
def test_rules_that_make_no_sense_are_told(rule, told):
    with pytest.raises(SettingsError, match=f"rule 1 of key_mapping.*{told}"):
        parse_rules([rule])


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"from": "kept", "to": ["a", "b"], "split": 0}, r"\[5\] is to be split into 2 equal parts"),
        ({"from": "kept", "to": ["a", "b"], "split": 3}, "cannot be changed as its rule says"),
        ({"from": "kept", "to": "a", "transpose": True}, "cannot be changed as its rule says"),
        ({"from": ["kept", "gone"], "to": "a", "join": 0}, "number 1 is missing"),
        ({"from": ["kept", "scalar"], "to": "a", "join": 0}, "their element types differ"),
        ({"from": "blocks.{b}.head.{n}", "to": "kept", "stack": True}, "takes one {place} more"),
        ({"from": "scalar", "to": "kept"}, "both become 'kept'"),
        ({"from": "kept", "to": "a", "rows": "pairs_to_halves", "head_dim": 4}, "has 5 rows, which are not heads of 4"),
    ],
)
def test_tensors_that_do_not_fit_a_rule_are_told(path, rule, told):
    with pytest.raises((CheckpointError, SettingsError), match=told):
        open_checkpoint(path, key_mapping=[rule])


def test_a_missing_number_is_told(tmp_path):
    state = {"e.0.w": torch.ones(2), "e.2.w": torch.ones(2)}
    rule = {"from": "e.{n}.w", "to": "e.w", "stack": True}
    with pytest.raises(CheckpointError, match="number 1 is missing"):
        open_checkpoint(save(state, tmp_path / "a"), key_mapping=[rule])
    with pytest.raises(CheckpointError, match="'x' where a number is to be stacked by"):
        open_checkpoint(save({"e.x.w": torch.ones(2)}, tmp_path / "b"), key_mapping=[rule])
