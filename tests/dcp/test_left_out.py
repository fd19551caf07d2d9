"""What a training saves beside its model is not served as weights, whatever the framework calls it."""

import pytest
import torch

from engine_loader import CheckpointError, SettingsError, open_checkpoint
from engine_loader.loading.find import TrainingCheckpoint
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings

from .states import same, save

MODEL = {"layers.0.w": torch.ones(4, 6), "layers.1.w": torch.full((4, 6), 2.0), "head.w": torch.ones(3)}


def adam() -> dict:
    """An optimizer's state as torch has it, by the parameters' numbers."""
    slots = {
        n: {"step": torch.tensor(3.0), "exp_avg": w * 0, "exp_avg_sq": w * 0} for n, w in enumerate(MODEL.values())
    }
    return {"state": slots, "param_groups": [{"lr": torch.tensor(0.1), "params": [0, 1, 2]}]}


def flat(*slots: str) -> dict:
    """An optimizer's state by the parameters' names, in one dict, as FSDP2 and torchtitan have it."""
    return {f"state.{name}.{slot}": tensor * 0 for name, tensor in MODEL.items() for slot in slots}


def slots_first() -> dict:
    """As Megatron's distributed optimizer has it."""
    return {f"state.{slot}.{name}": tensor * 0 for name, tensor in MODEL.items() for slot in ("exp_avg", "fp32_param")}


ADAM = ("step", "exp_avg", "exp_avg_sq")
BESIDE = {
    "optimizer_0": {"optimizer_0": adam()},
    "optim_0": {"optim_0": adam()},
    "optimizer0": {"optimizer0": {"any": torch.ones(2)}},
    "opt": {"opt": adam()},
    "opt, flat": {"opt": flat(*ADAM)},
    "opt, sgd": {"opt": flat("momentum_buffer")},
    "opt, adagrad": {"opt": {"state": {0: {"sum": torch.ones(4, 6)}}, "param_groups": [{"params": [0]}]}},
    "opt_state": {"opt_state": {"mu": {"w": torch.ones(4, 6)}}},
    "generator_optimizer": {"generator_optimizer": {"any": torch.ones(2)}},
    "optimizer_states": {"optimizer_states": [adam()]},
    "the optimizer's own keys": adam(),
    "megatron": {"chained_0": slots_first()},
    "deepspeed universal": {f"zero.{name}.{slot}": w * 0 for name, w in MODEL.items() for slot in (*ADAM, "fp32")},
    "torchtitan": {
        "optimizer": flat(*ADAM),
        "lr_scheduler": {"last_epoch": torch.tensor(3)},
        "dataloader": {"dp_rank_0": torch.ones(7, dtype=torch.uint8)},
        "train_state": {"step": torch.tensor(3), "ntokens_seen": torch.tensor(99)},
    },
    "step and lr": {"step": torch.tensor(3), "lr": torch.tensor(0.1), "global_step": torch.tensor([3])},
    "rng": {"rng_state": torch.ones(16, dtype=torch.uint8), "cuda_rng_states": [torch.ones(8, dtype=torch.uint8)]},
    "random states": {"random_states_0": {"torch": torch.ones(16, dtype=torch.uint8)}},
    "extra state": {"model": {"layers.0._extra_state": torch.ones(5, dtype=torch.uint8)}},
    "megatron's extra state": {"model": {"layers.0._extra_state/shard_0_2": torch.ones(5, dtype=torch.uint8)}},
    "ema": {"ema": dict(MODEL)},
    "ema, wrapped": {"model_ema": {"module": dict(MODEL), "n_averaged": torch.tensor(4)}},
    "ema by rate": {"ema_0.9999": dict(MODEL)},
    "ema without dots": {"model_ema": {name.replace(".", ""): tensor for name, tensor in MODEL.items()}},
    "ema, a list": {"ema": {"shadow_params": list(MODEL.values())}},
}


@pytest.mark.parametrize("wrapping", ["model", "state_dict", None], ids=str)
@pytest.mark.parametrize("what", BESIDE)
def test_only_the_model_is_served(tmp_path, what, wrapping):
    beside = dict(BESIDE[what])
    inside = MODEL | beside.pop("model", {})
    save(beside | ({wrapping: inside} if wrapping else inside), tmp_path / "c")
    expected = {f"{wrapping}.{name}" if wrapping else name: tensor for name, tensor in MODEL.items()}
    with open_checkpoint(tmp_path / "c") as checkpoint:
        assert same(dict(sorted(checkpoint.tensors())), dict(sorted(expected.items())))
    with open_checkpoint(tmp_path / "c", optimizer_state=True) as checkpoint:
        assert len(checkpoint.keys()) > len(MODEL)


SERVED = {
    "an optimizer of the name alone": {"optimizer_embedding": torch.ones(2), "optimized": {"w": torch.ones(2)}},
    "a step that is a matrix": {"step": torch.ones(2, 2), "lr": {"w": torch.ones(2)}},
    "a state of the model": {"state": {"0": {"w": torch.ones(2)}, "sum": torch.ones(2)}},
    "OPT": {"opt": {"decoder.w": torch.ones(2), "decoder.state": torch.ones(2)}},
    "an averaging layer": {"layers.0.ema_gate": {"w": torch.ones(2)}, "ema": torch.ones(1)},
    "only the averaged model": {"ema": {"other.w": torch.ones(9, 2), "other.v": torch.ones(9)}},
    "one buffer of an optimizer's name": {"queue": {"momentum_buffer": torch.ones(2)}},
    "parameters of which the optimizer has the only copy": None,
}


@pytest.mark.parametrize("what", SERVED)
def test_what_is_only_named_alike_is_served(tmp_path, what):
    state = SERVED[what]
    if state is None:
        state = {f"{name}.{slot}": w * 0 for name, w in MODEL.items() for slot in ("fp32", "exp_avg", "exp_avg_sq")}
        expected = {f"{name}.fp32" for name in MODEL}
    else:
        state = MODEL | state
        expected = set()
    save(state, tmp_path / "c")
    with open_checkpoint(tmp_path / "c", optimizer_state=True) as checkpoint:
        every = set(checkpoint.keys())
    with open_checkpoint(tmp_path / "c") as checkpoint:
        assert set(checkpoint.keys()) == (expected or every)


def test_the_averaged_copy_is_served_where_key_mapping_asks_for_it(tmp_path):
    averaged = {name: tensor + 1 for name, tensor in MODEL.items()}
    save({"model": MODEL, "ema": averaged}, tmp_path / "c")
    with open_checkpoint(tmp_path / "c", key_mapping={"^model[.]": None, "^ema[.]": ""}) as checkpoint:
        assert same(dict(sorted(checkpoint.tensors())), dict(sorted(averaged.items())))
    with open_checkpoint(tmp_path / "c", key_mapping={"w$": "weight", "^model[.]": ""}) as checkpoint:
        assert sorted(checkpoint.keys()) == ["model.head.weight", "model.layers.0.weight", "model.layers.1.weight"]


def test_the_log_line_says_what_was_left_out(tmp_path):
    save({"model": MODEL | {"old": torch.ones(8)}, "optimizer_0": adam()}, tmp_path / "c")
    settings = load_settings({"key_mapping": '{"old$": null}'}).settings.loader
    lines: list[str] = []
    names = [name for name, _ in stream_weights(TrainingCheckpoint(str(tmp_path / "c")), settings, tell=lines.append)]
    assert sorted(names) == sorted(f"model.{name}" for name in MODEL)
    assert "left out: by key_mapping (1 tensor, 32 B), optimizer state (10 tensors, 424 B)" in lines[0]


@pytest.mark.parametrize("mapping", [{"^model[.]head[.]w$": ""}, lambda name: ""], ids=["expression", "function"])
def test_an_empty_name_is_an_error(tmp_path, mapping):
    save({"model": MODEL}, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"makes an empty name of 'model.*null in place of the replacement"):
        open_checkpoint(tmp_path / "c", key_mapping=mapping)


def test_null_leaves_tensors_out_and_other_values_are_refused(tmp_path, monkeypatch):
    save({"net": MODEL, "old": torch.ones(2)}, tmp_path / "c")
    monkeypatch.setenv("ENGINE_LOADER_LOADER__KEY_MAPPING", '{"^old": null, "^net[.]layers[.]1": null, "^net[.]": ""}')
    with open_checkpoint(tmp_path / "c") as checkpoint:
        assert sorted(checkpoint.keys()) == ["head.w", "layers.0.w"]
    with pytest.raises(SettingsError, match="null in place of a replacement leaves tensors out"):
        load_settings({"key_mapping": {"a": 3}})
