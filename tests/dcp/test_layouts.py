"""Trainings whose tensors differ from transformers' by more than names: equal logits show that they are read right."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.conversion import convert_checkpoint

from .states import save

DIM, HEADS, KV_HEADS, HEAD_DIM, LAYERS, HIDDEN, VOCABULARY = 32, 4, 2, 8, 2, 48, 64
CONFIG = LlamaConfig(
    hidden_size=DIM,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    num_hidden_layers=LAYERS,
    intermediate_size=HIDDEN,
    vocab_size=VOCABULARY,
    rms_norm_eps=1e-5,
    attn_implementation="eager",
)
RENAMED_ONLY = {
    r"^tok_embeddings[.]": "model.embed_tokens.",
    r"^layers[.](\d+)[.]attention[.]w([qkvo])[.]": r"model.layers.\1.self_attn.\2_proj.",
}


def weights() -> dict[str, torch.Tensor]:
    """A tiny Llama by torchtitan's names."""
    torch.manual_seed(5)
    shapes = dict.fromkeys(("tok_embeddings.weight", "output.weight"), (VOCABULARY, DIM)) | {"norm.weight": (DIM,)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (HEADS * HEAD_DIM, DIM),
            f"layers.{layer}.attention.wk.weight": (KV_HEADS * HEAD_DIM, DIM),
            f"layers.{layer}.attention.wv.weight": (KV_HEADS * HEAD_DIM, DIM),
            f"layers.{layer}.attention.wo.weight": (DIM, HEADS * HEAD_DIM),
            f"layers.{layer}.feed_forward.w1.weight": (HIDDEN, DIM),
            f"layers.{layer}.feed_forward.w2.weight": (DIM, HIDDEN),
            f"layers.{layer}.feed_forward.w3.weight": (HIDDEN, DIM),
            f"layers.{layer}.attention_norm.weight": (DIM,),
            f"layers.{layer}.ffn_norm.weight": (DIM,),
        }
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def rotated(heads: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbouring elements as complex numbers, like torchtitan; [length, heads, head_dim]."""
    frequencies = 1 / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(len(heads)).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


def logits(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """What torchtitan's Llama computes, written from its published model."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, (DIM,), w[name], 1e-5)

    x = w["tok_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        p = f"layers.{layer}"
        h = norm(x, f"{p}.attention_norm.weight")
        q, k, v = ((h @ w[f"{p}.attention.w{part}.weight"].T).reshape(len(tokens), -1, HEAD_DIM) for part in "qkv")
        q, k = rotated(q), rotated(k).repeat_interleave(HEADS // KV_HEADS, 1)
        v = v.repeat_interleave(HEADS // KV_HEADS, 1)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
        x = x + attended.reshape(len(tokens), -1) @ w[f"{p}.attention.wo.weight"].T
        h = norm(x, f"{p}.ffn_norm.weight")
        gate, up = (h @ w[f"{p}.feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        x = x + (functional.silu(gate) * up) @ w[f"{p}.feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """As torchtitan saves: the model's names at the top, the rest beside."""
    beside = {"freqs_cis": torch.ones(4, 4), "train_state": {"step": torch.tensor(1)}}
    return save(weights() | beside, tmp_path / "training")


@pytest.mark.parametrize("given", ["config.json", "in the setting"])
def test_torchtitans_llama_gives_its_logits_in_transformers(training, tmp_path, given):
    mapping = "torchtitan-llama"
    if given == "config.json":
        (training / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    else:
        mapping += f":{HEAD_DIM}"
    convert_checkpoint(str(training), str(tmp_path / "model"), key_mapping=mapping)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.arange(20) * 7 % VOCABULARY
    with torch.no_grad():
        found = model(tokens[None]).logits[0]
    expected = logits(weights(), tokens)
    assert torch.allclose(found, expected, atol=1e-4)
    assert expected.std() > 0.1


def test_every_way_of_reading_has_the_same_order(training):
    with open_checkpoint(training, key_mapping=f"torchtitan-llama:{HEAD_DIM}") as checkpoint:
        name = "model.layers.0.self_attn.k_proj.weight"
        whole = checkpoint.get_tensor(name)
        stored = weights()["layers.0.attention.wk.weight"]
        assert torch.equal(whole[:HEAD_DIM], stored[[0, 2, 4, 6, 1, 3, 5, 7]])
        assert torch.equal(whole[HEAD_DIM:], stored[[8, 10, 12, 14, 9, 11, 13, 15]])
        assert torch.equal(dict(checkpoint.tensors())[name], whole)
        assert torch.equal(checkpoint.get_slice(name)[3:11, 5:9], whole[3:11, 5:9])
        target = torch.zeros_like(whole)
        checkpoint.load_into({name: target})
        assert torch.equal(target, whole)
        assert "freqs_cis" not in checkpoint


def test_rows_of_a_head_that_are_not_known_are_an_error(training):
    with pytest.raises(CheckpointError, match=r"needs the number of rows of a head.*torchtitan-llama:128"):
        open_checkpoint(training, key_mapping="torchtitan-llama")
    told = pytest.raises(CheckpointError, match=r"has 16 rows, which are not heads of 10")
    with open_checkpoint(training, key_mapping="torchtitan-llama:10") as checkpoint, told:
        checkpoint.get_tensor("model.layers.0.self_attn.k_proj.weight")


def test_a_rename_alone_is_warned_of(training, caplog):
    with open_checkpoint(training, key_mapping=RENAMED_ONLY):
        assert "key_mapping=torchtitan-llama reorders them" in caplog.text
        assert "gives wrong answers" in caplog.text
    caplog.clear()
    with open_checkpoint(training), open_checkpoint(training, key_mapping="torchtitan-llama:8"):
        assert "torchtitan-llama" not in caplog.text


def test_it_is_not_for_what_is_no_training(tmp_path):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is for training checkpoints, and this is none"):
        convert_checkpoint(str(tmp_path / "model"), str(tmp_path / "out"), to="dcp", key_mapping="torchtitan-llama:8")
    assert not (tmp_path / "out").exists()


def test_a_rename_the_other_way_is_warned_of(tmp_path, caplog):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    mapping = {r"^model[.](layers[.]\d+)[.]self_attn[.]([qkvo])_proj": r"\1.attention.w\2"}
    convert_checkpoint(str(tmp_path / "model"), str(tmp_path / "out"), to="dcp", key_mapping=mapping)
    assert "a conversion to dcp does not reorder them" in caplog.text
