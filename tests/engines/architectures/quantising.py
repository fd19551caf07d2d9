"""Tiny quantised checkpoints: a model's configuration with each way of quantisation, and random tensors for what vLLM
then asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import SINGLE_FILE, VOCAB_SIZE, make_model, make_tokenizer
from tests.support.vllm_inprocess import load_model

from .inverting import checkpoint_of

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


def _compressed(kind: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": activations and dict(activations)}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": group},
    }


WAYS: dict[str, dict[str, Any]] = {
    "compressed-tensors-w4a16": _compressed(
        "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    ),
    "compressed-tensors-w8a8-int8": _compressed(
        "int-quantized", {**_INT8, "strategy": "channel"}, {**_INT8, "strategy": "token", "dynamic": True}
    ),
    "compressed-tensors-fp8-static": _compressed(
        "float-quantized", {**_FP8, "strategy": "tensor"}, {**_FP8, "strategy": "tensor", "dynamic": False}
    ),
    "compressed-tensors-fp8-channel": _compressed(
        "float-quantized", {**_FP8, "strategy": "channel"}, {**_FP8, "strategy": "token", "dynamic": True}
    ),
    "fp8-static": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "dynamic": {"-:.*mlp.gate$": {}},
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["mlp.gate"],
    },
    "auto-round": {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
    },
    "modelopt-fp8": {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head*", "*mlp.gate"],
    },
    "modelopt-nvfp4": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head*", "*mlp.gate"],
    },
}
"""Name -> the model configuration's ``quantization_config``."""


@contextmanager
def any_kernel() -> Iterator[None]:
    """Have vLLM build layers for whose kernels this machine lacks what it takes; none runs here."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq, mxfp4
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as int8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )
    from vllm.platforms import PlatformEnum

    def yes(*_: Any) -> tuple[bool, None]:
        return True, None

    nvfp4 = linear.MarlinNvFp4LinearKernel
    with ExitStack() as stack:
        for kernel in (CPUFp8BlockScaledMMKernel, nvfp4):
            for question in ("is_supported", "can_implement"):
                stack.enter_context(mock.patch.object(kernel, question, yes))
        stack.enter_context(mock.patch.dict(linear._POSSIBLE_NVFP4_KERNELS, {PlatformEnum.CPU: [nvfp4]}))
        marlin = (WNA16MoEBackend.MARLIN, MarlinExperts)
        choices = [(module, "select_wna16_moe_backend", marlin) for module in (auto_awq, auto_gptq, wna16)]
        choices.append((int8, "select_int8_moe_backend", (Int8MoeBackend.TRITON, TritonExperts)))
        choices.append((mxfp4, "select_mxfp4_moe_backend", (Mxfp4MoeBackend.MARLIN, None)))
        for module, choice, chosen in choices:
            stack.enter_context(mock.patch.object(module, choice, lambda *_, _chosen=chosen, **__: _chosen))
        yield


def make_quantised(way: str, architecture: str, directory: Path) -> Path:
    """Write a tiny checkpoint of an architecture (of tiny_models) that is quantised in one of WAYS."""
    make_model(architecture, directory)
    path = directory / "config.json"
    content = json.loads(path.read_text()) | {"quantization_config": WAYS[way]}
    path.write_text(json.dumps(content, indent=2) + "\n")
    (directory / SINGLE_FILE).unlink()
    model = load_model(directory, "dummy")
    save_file(checkpoint_of(model), directory / SINGLE_FILE, metadata={"format": "pt"})
    return directory


def make_mxfp4(directory: Path) -> Path:
    """Write a tiny gpt-oss as it is published: its experts in blocks of 32 four-bit numbers with a common exponent."""
    make_model("gpt-oss", directory)
    tensors = load_file(directory / SINGLE_FILE)
    generator = torch.Generator().manual_seed(20)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        for kind, shape in (("blocks", (inputs // 32, 16)), ("scales", (inputs // 32,))):
            tensors[f"{name}_{kind}"] = torch.randint(
                0, 256, (experts, outputs, *shape), generator=generator, dtype=torch.uint8
            )
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    path = directory / "config.json"
    quantisation = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation}) + "\n")
    return directory


def make_mistral_fp8(directory: Path) -> Path:
    """Write a tiny model as Mistral publishes those in FP8: params.json, consolidated.safetensors, scales of its own
    names, and no config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    hidden, ffn, heads, kv_heads, head = 128, 256, 4, 2, 32
    parameters = {
        "dim": hidden,
        "n_layers": 2,
        "head_dim": head,
        "hidden_dim": ffn,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
    }
    generator = torch.Generator().manual_seed(20)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {name: some(VOCAB_SIZE, hidden).bfloat16() for name in ("tok_embeddings.weight", "output.weight")}
    tensors["norm.weight"] = some(hidden).bfloat16()
    linear = {
        "attention.wq": (heads * head, hidden),
        "attention.wk": (kv_heads * head, hidden),
        "attention.wv": (kv_heads * head, hidden),
        "attention.wo": (hidden, heads * head),
        "feed_forward.w1": (ffn, hidden),
        "feed_forward.w2": (hidden, ffn),
        "feed_forward.w3": (ffn, hidden),
    }
    for layer in range(2):
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"layers.{layer}.{name}.weight"] = some(hidden).bfloat16()
        for name, shape in linear.items():
            tensors[f"layers.{layer}.{name}.weight"] = some(*shape).to(torch.float8_e4m3fn)
            for scale in ("qscale_weight", "qscale_act"):
                tensors[f"layers.{layer}.{name}.{scale}"] = some().abs() + 0.01
    save_file(tensors, directory / "consolidated.safetensors", metadata={"format": "pt"})
    (directory / "params.json").write_text(json.dumps(parameters, indent=2) + "\n")
    make_tokenizer(directory)
    return directory
