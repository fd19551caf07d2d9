"""Makes tiny random models of many architectures, with a tokenizer, as checkpoints that transformers and vLLM load.

    python -m tests.support.tiny_models llama DIR --shards 3

Nothing is downloaded. The same arguments always give the same bytes, and no two tensors are alike: a loader that puts
one tensor in another's place, or leaves a norm at its initial value, is found out.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

SEED = 20
VOCAB_SIZE = 512
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# vLLM's attention on CPU takes head sizes of 32, 64, 80, 96, … only.
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_WITHOUT_GQA = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"}
_QWEN_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_FOUR_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TINY_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """`model_type` as transformers names it, and the values of its config.

    `made_by` is the Auto class of transformers; `quantised` names a way in which the linear layers are then packed.
    """

    model_type: str
    values: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    made_by: str = "AutoModelForCausalLM"
    quantised: str | None = None

    def config(self, overrides: dict[str, Any]) -> Any:
        return AutoConfig.for_model(self.model_type, **{**self.values, **self.changes, **overrides})


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _BASE),
    "llama-tied": Architecture("llama", _BASE, {"tie_word_embeddings": True}),
    "mistral": Architecture("mistral", _BASE, {"head_dim": 32, "sliding_window": None}),
    "qwen2": Architecture("qwen2", _BASE),
    "qwen3": Architecture("qwen3", _BASE, {"head_dim": 32}),
    "mixtral": Architecture("mixtral", _BASE, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": Architecture("qwen2_moe", _BASE, {**_QWEN_MOE, "shared_expert_intermediate_size": 128}),
    "qwen3-moe": Architecture("qwen3_moe", _BASE, {**_QWEN_MOE, "head_dim": 32}),
    "deepseek-v2": Architecture(
        "deepseek_v2",
        _BASE,
        {
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gemma2": Architecture("gemma2", _BASE, {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gemma3": Architecture(
        "gemma3_text",
        _BASE,
        {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window": 64},
    ),
    "phi3": Architecture("phi3", _BASE, {"original_max_position_embeddings": 512}),
    "olmo2": Architecture("olmo2", _BASE),
    "gpt-neox": Architecture("gpt_neox", _WITHOUT_GQA),
    "opt": Architecture(
        "opt", _WITHOUT_GQA, {"ffn_dim": 256, "word_embed_proj_dim": 128, "dropout": 0.0, "tie_word_embeddings": True}
    ),
    "falcon": Architecture(
        "falcon",
        _WITHOUT_GQA,
        {"multi_query": True, "new_decoder_architecture": False, "bias": False, "tie_word_embeddings": True},
    ),
    "gpt2": Architecture(
        "gpt2",
        {"vocab_size": VOCAB_SIZE, "n_embd": 128, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 512},
        {"bos_token_id": 0, "eos_token_id": 1},
    ),
    "bloom": Architecture(
        "bloom",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "n_layer": 2, "n_head": 4},
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    ),
    "mamba2": Architecture(
        "mamba2",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 2, "expand": 2, "head_dim": 32},
        {"num_heads": 8, "n_groups": 2, "state_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    ),
    "gemma": Architecture("gemma", _BASE, {"head_dim": 32, "tie_word_embeddings": True}),
    "cohere": Architecture("cohere", _BASE, {"tie_word_embeddings": True}),
    "stablelm": Architecture("stablelm", _BASE),
    "starcoder2": Architecture("starcoder2", _BASE),
    "granite": Architecture("granite", _BASE),
    "granite-moe": Architecture("granitemoe", _BASE, _FOUR_EXPERTS),
    "olmoe": Architecture("olmoe", _BASE, {"num_experts": 4, "num_experts_per_tok": 2}),
    "nemotron": Architecture("nemotron", _BASE, {"head_dim": 32}),
    "exaone4": Architecture("exaone4", _BASE, {"head_dim": 32, "sliding_window": 64}),
    "gpt-j": Architecture(
        "gptj",
        {"vocab_size": VOCAB_SIZE, "n_embd": 128, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 512},
        {"rotary_dim": 32, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "gpt-oss": Architecture("gpt_oss", _BASE, {**_FOUR_EXPERTS, "head_dim": 32, "sliding_window": 64}),
    "glm4-moe": Architecture("glm4_moe", _BASE, {**_ROUTED, "head_dim": 32}),
    "deepseek-v3": Architecture(
        "deepseek_v3",
        _BASE,
        {
            **_ROUTED,
            "num_key_value_heads": 4,
            "q_lora_rank": 48,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "topk_method": "noaux_tc",
        },
    ),
    "qwen3-next": Architecture(
        "qwen3_next",
        _BASE,
        {
            **_QWEN_MOE,
            "head_dim": 32,
            "shared_expert_intermediate_size": 64,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    ),
    "jamba": Architecture(
        "jamba",
        _BASE,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_dt_rank": 16,
            "use_mamba_kernels": False,
        },
    ),
    "falcon-h1": Architecture(
        "falcon_h1",
        _BASE,
        {
            "head_dim": 32,
            "mamba_d_ssm": 256,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 32,
        },
    ),
    "granite-moe-hybrid": Architecture(
        "granitemoehybrid",
        _BASE,
        {
            **_FOUR_EXPERTS,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
        },
    ),
    "mamba": Architecture(
        "mamba",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16, "expand": 2},
        _TOKEN_IDS,
    ),
    "bert": Architecture("bert", _WITHOUT_GQA, {"type_vocab_size": 2}, made_by="AutoModel"),
    "roberta": Architecture("roberta", _WITHOUT_GQA, {"type_vocab_size": 1}, made_by="AutoModel"),
    "modernbert": Architecture("modernbert", _WITHOUT_GQA, made_by="AutoModel"),
    "blip2": Architecture(
        "blip-2",
        {"image_token_index": 5, "num_query_tokens": 4},
        {
            "text_config": {"model_type": "opt", **_WITHOUT_GQA, "ffn_dim": 256, "word_embed_proj_dim": 128},
            "vision_config": {"model_type": "blip_2_vision_model", **_TINY_VISION},
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "encoder_hidden_size": 64,
                "vocab_size": 64,
            },
        },
        made_by="AutoModelForImageTextToText",
    ),
    "llama-gptq": Architecture("llama", _BASE, quantised="gptq"),
    "llama-awq": Architecture("llama", _BASE, quantised="awq"),
    "llama-fp8": Architecture("llama", _BASE, quantised="fp8"),
    "llama-w8a8": Architecture("llama", _BASE, quantised="compressed-tensors"),
    "qwen3-moe-fp8": Architecture("qwen3_moe", _BASE, {**_QWEN_MOE, "head_dim": 32}, quantised="fp8"),
}


def make_model(
    arch: str, directory: str | os.PathLike[str], *, shards: int = 1, seed: int = SEED, **config_overrides: Any
) -> Path:
    """Writes a bf16 checkpoint of `arch` (a key of ARCHITECTURES), its config and a tokenizer into `directory`.

    With more than one of `shards` there are that many files and an index; another `seed` gives other weights.
    `config_overrides` are keys of the architecture's transformers config, e.g. `num_hidden_layers=4`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    config = ARCHITECTURES[arch].config(config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, ARCHITECTURES[arch].made_by).from_config(config, dtype=torch.bfloat16)
        _make_every_tensor_different(model)
    model.save_pretrained(directory, max_shard_size="100GB")
    if ARCHITECTURES[arch].quantised:
        quantise(directory, ARCHITECTURES[arch].quantised or "")
    if shards > 1:
        split_checkpoint(directory, shards)
    make_tokenizer(directory, vocab_size=config.get_text_config().vocab_size)
    return directory


@torch.no_grad()
def _make_every_tensor_different(model: torch.nn.Module) -> None:
    """Noise on everything: initialisation leaves all norms at one and all biases at zero."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


def quantise(directory: Path, way: str) -> None:
    """Puts random packed tensors, laid out as `way` lays them out, in the place of the linear layers' weights."""
    path = directory / SINGLE_FILE
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and name.endswith("_proj.weight"):
            packed = _PACKED[way](tensor, generator)
            tensors |= {f"{layer}.{key}": value for key, value in packed.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = _QUANTISATION[way]
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _words(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def _scales(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)


def _gptq(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    groups = inputs // _GROUP
    return {
        "qweight": _words((inputs // 8, outputs), generator),
        "qzeros": _words((groups, outputs // 8), generator),
        "scales": _scales((groups, outputs), generator, torch.bfloat16),
        "g_idx": (torch.arange(inputs) // _GROUP).to(torch.int32),
    }


def _awq(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    groups = inputs // _GROUP
    return {
        "qweight": _words((inputs, outputs // 8), generator),
        "qzeros": _words((groups, outputs // 8), generator),
        "scales": _scales((groups, outputs), generator, torch.bfloat16),
    }


def _fp8(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": _scales((), generator, torch.float32)}


def _w8a8(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    words = torch.randint(-128, 128, tuple(weight.shape), generator=generator)
    return {"weight": words.to(torch.int8), "weight_scale": _scales((weight.shape[0], 1), generator, torch.bfloat16)}


_GROUP = 32
_PACKED = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "compressed-tensors": _w8a8}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_QUANTISATION: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_INT8, "strategy": "channel", "dynamic": False},
                "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
            }
        },
    },
}


def split_checkpoint(directory: Path, shards: int) -> None:
    """Turns `model.safetensors` into exactly `shards` files of about the same size, and their index.

    (transformers' own max_shard_size bounds a file's size and leaves open how many files come out.)
    """
    single = directory / SINGLE_FILE
    with safe_open(single, framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - it is not a dict
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_split_evenly(tensors, shards), start=1):
        file_name = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(part, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    single.unlink()


def _split_evenly(tensors: dict[str, torch.Tensor], parts: int) -> Iterator[dict[str, torch.Tensor]]:
    if not 1 <= parts <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot be split into {parts} files")
    left = dict(tensors)
    for parts_left in range(parts, 0, -1):
        wanted_bytes = sum(tensor.nbytes for tensor in left.values()) / parts_left
        part: dict[str, torch.Tensor] = {}
        while left and (not part or sum(tensor.nbytes for tensor in part.values()) < wanted_bytes):
            if len(left) < parts_left and part:  # one tensor at least for each of the files that follow
                break
            name = next(iter(left))
            part[name] = left.pop(name)
        yield part


def make_tokenizer(directory: str | os.PathLike[str], *, vocab_size: int = VOCAB_SIZE) -> None:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, so that every id that a model picks has a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    if missing < 0:
        raise ValueError(f"vocab_size {vocab_size} is below the {tokenizer.get_vocab_size()} tokens that bytes need")
    tokenizer.add_tokens([f"<filler_{number}>" for number in range(missing)])
    bos, eos, pad = SPECIAL_TOKENS
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad).save_pretrained(
        directory
    )


TRAINING_TEXT = """
A cold start is the time between the moment when a server is asked for and the moment when it answers. Most of it goes
into bytes: the image is pulled, the weights are read, the kernels are compiled, and the graphs are captured. The bytes
of the weights lie in shards, the shards lie on disks, the disks lie in other machines, and between them there is a
network. A loader that reads one tensor after another waits for each of them; a loader that knows all of them first can
ask for everything at once, in the order in which it lies, and put it where it belongs. The lazy dog sleeps. The quick
brown fox has read this text before, and jumps over the sentences that it knows. Hello, world: what is the capital of
France? It is Paris. How many layers has a small model? Two. How many heads? Four. Once upon a time there was an engine
that waited for its weights, and it waited, and waited, until somebody measured where the time went.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny random model with a tokenizer.")
    parser.add_argument("arch", choices=sorted(ARCHITECTURES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files (default: 1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="override a key of the config")
    arguments = parser.parse_args()
    overrides = {key: json.loads(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    print(make_model(arguments.arch, arguments.directory, shards=arguments.shards, **overrides))


if __name__ == "__main__":
    main()
