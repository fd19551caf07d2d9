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
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
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


@dataclass(frozen=True)
class Architecture:
    """`model_type` as transformers names it, and the values of its config."""

    model_type: str
    values: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)

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
}


def make_model(arch: str, directory: str | os.PathLike[str], *, shards: int = 1, **config_overrides: Any) -> Path:
    """Writes a bf16 checkpoint of `arch` (a key of ARCHITECTURES), its config and a tokenizer into `directory`.

    With more than one of `shards` there are that many files and an index. `config_overrides` are keys of the
    architecture's transformers config, e.g. `num_hidden_layers=4`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    config = ARCHITECTURES[arch].config(config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        _make_every_tensor_different(model)
    model.save_pretrained(directory, max_shard_size="100GB")
    if shards > 1:
        split_checkpoint(directory, shards)
    make_tokenizer(directory, vocab_size=config.vocab_size)
    return directory


@torch.no_grad()
def _make_every_tensor_different(model: torch.nn.Module) -> None:
    """Noise on everything: initialisation leaves all norms at one and all biases at zero."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


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
