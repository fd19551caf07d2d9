"""Trainings whose tensors differ from transformers' by more than names: equal logits show that they are read right."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3MoeConfig,
)

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.conversion import convert_checkpoint
from engine_loader.loading.mapping.named_layouts import is_layout
from engine_loader.settings import LoaderSettings

from .states import same, save

DIM, HEADS, KV_HEADS, HEAD_DIM, LAYERS, HIDDEN, VOCABULARY = 32, 4, 2, 8, 2, 48, 64
SIZES: dict[str, Any] = {
    "hidden_size": DIM,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
CONFIG = LlamaConfig(**SIZES, rms_norm_eps=1e-5)
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


def rotated(heads: torch.Tensor, base: float, *, halves: bool) -> torch.Tensor:
    """Rotary embedding of neighbouring elements as complex numbers, like torchtitan's Llama, or of the two halves of
    each head, like its Qwen3; [length, heads, head_dim]."""
    frequencies = 1 / base ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(len(heads)).float(), frequencies)
    if halves:
        first, second = heads.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


def logits(
    w: dict[str, torch.Tensor], tokens: torch.Tensor, *, halves: bool = False, base: float = 10000, eps: float = 1e-5
) -> torch.Tensor:
    """What torchtitan's Llama computes (with ``halves``, its Qwen3), written from its published models."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], w[name], eps) if name in w else x

    x = w["tok_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        p = f"layers.{layer}"
        h = norm(x, f"{p}.attention_norm.weight")
        q, k, v = ((h @ w[f"{p}.attention.w{part}.weight"].T).reshape(len(tokens), -1, HEAD_DIM) for part in "qkv")
        q, k = norm(q, f"{p}.attention.q_norm.weight"), norm(k, f"{p}.attention.k_norm.weight")
        q, k = (rotated(part, base, halves=halves) for part in (q, k))
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
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
    with pytest.raises(CheckpointError, match=r"has 32 rows, which are not heads of 10"):
        open_checkpoint(training, key_mapping="torchtitan-llama:10")


def test_a_rename_alone_is_warned_of(training, caplog):
    with open_checkpoint(training, key_mapping=RENAMED_ONLY):
        assert "key_mapping=torchtitan-llama reorders them" in caplog.text
        assert "gives wrong answers" in caplog.text
    caplog.clear()
    with open_checkpoint(training), open_checkpoint(training, key_mapping="torchtitan-llama:8"):
        assert "torchtitan-llama" not in caplog.text


RENAMED: dict[str, tuple[dict[str, str], list[str], str]] = {
    "torchtune's Llama": (
        {r"^layers[.](\d+)[.]attn[.]([qk])_proj": r"model.layers.\1.self_attn.\2_proj"},
        ["layers.0.attn.q_proj.weight", "layers.0.sa_norm.scale"],
        "key_mapping=torchtune-llama reorders them",
    ),
    "torchtune's Qwen3": (
        {r"^layers[.](\d+)[.]attn[.]([qk])_proj": r"model.layers.\1.self_attn.\2_proj"},
        ["layers.0.attn.q_proj.weight", "layers.0.attn.q_norm.scale", "layers.0.sa_norm.scale"],
        "",
    ),
    "Megatron's": (
        {r"^decoder[.](layers[.]\d+)[.]self_attention[.]linear_qkv": r"model.\1.self_attn.qkv_proj"},
        ["decoder.layers.0.self_attention.linear_qkv.weight"],
        "let Megatron Bridge export it",
    ),
    "torchtitan's Qwen3": (RENAMED_ONLY, ["layers.0.attention.wq.weight", "layers.0.attention.q_norm.weight"], ""),
    "torchtitan's DeepSeek": (RENAMED_ONLY, ["layers.0.attention.wq.weight", "layers.0.attention.wkv_a.weight"], ""),
    "torchtitan's Llama 4": (RENAMED_ONLY, ["layers.0.attention.wq.weight", "layers.0.moe.experts.w1"], ""),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_only_layouts_that_a_rename_gets_wrong_are_warned_of(tmp_path, kind, caplog):
    mapping, names, told = RENAMED[kind]
    path = save({"model": {name: torch.zeros(2, 2) for name in names}}, tmp_path / "c")
    with open_checkpoint(path, key_mapping=lambda name: _renamed(name.removeprefix("model."), mapping)):
        pass
    assert ("gives wrong answers" in caplog.text) == bool(told)
    assert told in caplog.text


def _renamed(name: str, mapping: dict[str, str]) -> str:
    for pattern, new in mapping.items():
        name = re.sub(pattern, new, name)
    return name


def test_torchtunes_llama_gives_its_logits_in_transformers(tmp_path):
    """Its names and its order, as its own conversion from transformers makes them."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(CONFIG).float().eval()
    names = {"embed_tokens": "tok_embeddings", "model.norm.weight": "norm.scale", "lm_head": "output"}
    names |= {"self_attn.o_proj": "attn.output_proj", "self_attn": "attn", "mlp.gate_proj": "mlp.w1"}
    names |= {"mlp.down_proj": "mlp.w2", "mlp.up_proj": "mlp.w3", "input_layernorm.weight": "sa_norm.scale"}
    names |= {"post_attention_layernorm.weight": "mlp_norm.scale", "model.": ""}
    trained = {}
    for name, tensor in model.state_dict().items():
        heads = HEADS if "q_proj" in name else KV_HEADS
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.view(heads, 2, HEAD_DIM // 2, DIM).transpose(1, 2).reshape(heads * HEAD_DIM, DIM)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        trained[name] = tensor
    assert {"layers.1.attn.k_proj.weight", "norm.scale", "layers.0.sa_norm.scale", "layers.1.mlp.w3.weight"} <= set(
        trained
    )
    save(trained, tmp_path / "training")
    (tmp_path / "training" / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    convert_checkpoint(str(tmp_path / "training"), str(tmp_path / "model"), key_mapping="torchtune-llama")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = (torch.arange(20) * 7 % VOCABULARY)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.allclose(back(tokens).logits, expected, atol=1e-5)
    assert expected.std() > 0.01
    convert_checkpoint(str(tmp_path / "model"), str(tmp_path / "out"), to="dcp", key_mapping="torchtune-llama")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert same(trained, dict(checkpoint.tensors()))


def test_a_model_goes_to_torchtitan_and_gives_its_logits_there(tmp_path):
    torch.manual_seed(3)
    model = LlamaForCausalLM(CONFIG).float()
    model.save_pretrained(tmp_path / "model")
    convert_checkpoint(str(tmp_path / "model"), str(tmp_path / "out"), to="dcp", key_mapping="torchtitan-llama")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        w = dict(checkpoint.tensors())
    assert w.keys() == weights().keys()
    tokens = torch.arange(20) * 7 % VOCABULARY
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert torch.allclose(logits(w, tokens), expected, atol=1e-4)
    assert expected.std() > 0.01


def test_a_rename_the_other_way_is_warned_of(tmp_path, caplog):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    mapping = {r"^model[.](layers[.]\d+)[.]self_attn[.]([qkvo])_proj": r"\1.attention.w\2"}
    convert_checkpoint(str(tmp_path / "model"), str(tmp_path / "out"), to="dcp", key_mapping=mapping)
    assert "key_mapping=torchtitan-llama reorders them" in caplog.text


QWEN3 = Qwen3Config(**SIZES, head_dim=HEAD_DIM)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
MODELS: dict[str, tuple[str, Any, set[str]]] = {
    "qwen3": ("torchtitan-qwen3", QWEN3, {"layers.0.attention.q_norm.weight", "layers.1.feed_forward.w1.weight"}),
    "qwen3 moe": (
        "torchtitan-qwen3",
        Qwen3MoeConfig(**SIZES, head_dim=HEAD_DIM, **MOE),
        {"layers.0.moe.experts.w1", "layers.1.moe.router.gate.weight"},
    ),
    "deepseek v3": (
        "torchtitan-deepseek_v3",
        DeepseekV3Config(
            **SIZES | {"num_key_value_heads": HEADS},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
        ),
        {
            "layers.0.feed_forward.w2.weight",
            "layers.1.moe.experts.w3",
            "layers.1.moe.expert_bias",
            "layers.1.moe.shared_experts.w2.weight",
            "layers.0.attention.wkv_b.weight",
        },
    ),
    "llama": ("meta-llama", CONFIG, set(weights())),
}


@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back_gives_the_same_logits(tmp_path, kind):
    """What lies between has the names that torchtitan publishes, and no others."""
    mapping, config, expected = MODELS[kind]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path / "model")
    convert_checkpoint(str(tmp_path / "model"), str(tmp_path / "training"), to="dcp", key_mapping=mapping)
    with open_checkpoint(tmp_path / "training") as checkpoint:
        names = set(checkpoint)
        assert expected <= names
        assert not [name for name in names if name.startswith("model.") or "_proj" in name]
        stacked = [checkpoint.info(name).shape for name in names if ".moe.experts." in name]
        assert all(len(shape) == 3 and shape[0] == 4 for shape in stacked)
    convert_checkpoint(str(tmp_path / "training"), str(tmp_path / "back"), key_mapping=mapping)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    tokens = (torch.arange(20) * 7 % VOCABULARY)[None]
    assert same(model.state_dict(), back.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, back(tokens).logits, atol=1e-5)


def test_qwen3_of_torchtitan_gives_its_logits_in_transformers(tmp_path):
    torch.manual_seed(9)
    norms = {f"layers.{layer}.attention.{part}_norm.weight": torch.rand(HEAD_DIM) for layer in (0, 1) for part in "qk"}
    trained = weights() | norms
    save({"model": trained}, tmp_path / "training")
    (tmp_path / "training" / "config.json").write_text(json.dumps(QWEN3.to_dict()))
    convert_checkpoint(str(tmp_path / "training"), str(tmp_path / "model"), key_mapping="torchtitan-qwen3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.arange(20) * 7 % VOCABULARY
    with torch.no_grad():
        found = model(tokens[None]).logits[0]
    base = QWEN3.to_dict().get("rope_parameters", {}).get("rope_theta") or QWEN3.rope_theta
    assert torch.allclose(found, logits(trained, tokens, halves=True, base=base, eps=QWEN3.rms_norm_eps), atol=1e-4)


def test_llama4s_experts_are_turned_and_joined(tmp_path):
    experts = {f"layers.3.moe.experts.{part}": torch.randn(2, 6, 4) for part in ("w1", "w3")}
    experts |= {"layers.3.moe.experts.w2": torch.randn(2, 4, 6), "layers.3.moe.expert_bias": torch.zeros(2)}
    with open_checkpoint(save(experts, tmp_path / "c"), key_mapping="torchtitan-llama4") as checkpoint:
        found = dict(checkpoint.tensors())
    layer = "language_model.model.layers.3.feed_forward.experts."
    gate, up = (experts[f"layers.3.moe.experts.{part}"].transpose(1, 2) for part in ("w1", "w3"))
    assert found.keys() == {f"{layer}gate_up_proj", f"{layer}down_proj"}
    assert torch.equal(found[f"{layer}gate_up_proj"], torch.cat([gate, up], dim=-1))
    assert torch.equal(found[f"{layer}down_proj"], experts["layers.3.moe.experts.w2"].transpose(1, 2))


@pytest.mark.parametrize(
    "name",
    [
        "torchtitan-llama:128",
        "meta-llama",
        "torchtune-llama:64",
        "torchtitan-llama4",
        "torchtitan-qwen3",
        "torchtitan-deepseek_v3",
    ],
)
def test_a_layout_that_there_is_can_be_named_in_the_settings(name):
    assert is_layout(name)
    assert LoaderSettings(key_mapping=name).key_mapping == name
