"""The checkpoint that a model of vLLM asks for, found from the model itself, where transformers has no class for it.

Fused layers are taken apart under the names that the model's source gives for them, and what its mapper renames gets
its first name again. Whether all of it is right, vLLM's own loader says: what is missing is an error there.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_NEW_STYLE = re.compile(r'"\.?([\w.]+)": \(\s*"\.?([\w.]+)",\s*("\w+"|\d+)')
_OLD_STYLE = re.compile(r'\(\s*f?"\.?([\w.]+)",\s*f?"\.?([\w.]+)",\s*("\w+"|\d+)')
_EXPERTS = re.compile(r'ckpt_(gate|down|up)_proj_name="([\w.]*)"')
_DEFAULT = {
    "qkv_proj": {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    "gate_up_proj": {0: "gate_proj", 1: "up_proj"},
    "fused_qkv_a_proj": {0: "q_a_proj", 1: "kv_a_proj_with_mqa"},
}

_OF_MTP = 'name = name.replace("mtp.", "model.")'
_UNPREFIXED = 'name = "model." + name'

Parts = dict[str, dict[str | int, str]]


def checkpoint_of(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random tensors under the names, and of the shapes, that ``model.load_weights`` takes."""
    sources = "".join(_sources_of(model))
    parts, experts = _fused_parts(sources), dict(_EXPERTS.findall(sources))
    generator = torch.Generator().manual_seed(20)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            for full, shape in _pieces(prefix, name, layer, parameter, parts, experts):
                full = _before_rewriting(full, sources)
                kept = dtype if parameter.dtype == torch.float32 and "scale" not in name else parameter.dtype
                values = _random(shape, kept, generator)
                # Of gate and up projection, vLLM wants them equal.
                tensors[_original(full, model)] = torch.ones_like(values) if "input_" in name else values
    return tensors


def _random(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point:
        return (torch.rand(shape, generator=generator) * 0.2 + 0.001).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch.int64).to(dtype)


def _sources_of(model: nn.Module) -> Iterator[str]:
    modules = dict.fromkeys(type(part).__module__ for part in model.modules())
    for name in modules:
        if name.startswith(("vllm.model_executor.models", "vllm.models")):
            yield inspect.getsource(sys.modules[name])


def _fused_parts(sources: str) -> Parts:
    found: Parts = {fused: dict(names) for fused, names in _DEFAULT.items()}
    told: Parts = {}
    pairs = [(fused, original, shard) for original, fused, shard in _NEW_STYLE.findall(sources)]
    for fused, original, shard in [*pairs, *_OLD_STYLE.findall(sources)]:
        told.setdefault(fused.split(".")[-1], {}).setdefault(_shard(shard), original.split(".")[-1])
    return found | {fused: names for fused, names in told.items() if len(names) > 1}


def _shard(text: str) -> str | int:
    return int(text) if text.isdigit() else text.strip('"')


Shape = tuple[int, ...]


def _pieces(
    prefix: str, name: str, layer: nn.Module, parameter: Any, parts: Parts, experts: Mapping[str, str]
) -> Iterator[tuple[str, Shape]]:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    above, _, own = prefix.rpartition(".")
    names = parts.get(own, {})
    if name.startswith(("w13_", "w2_")) and parameter.dim() >= 1:
        yield from _of_experts(above if own == "routed_experts" else prefix, name, parameter, experts)
    elif isinstance(layer, QKVParallelLinear) and set(names) >= {"q", "k", "v"}:
        kv = layer.total_num_kv_heads
        sizes = [layer.total_num_heads * layer.head_size, kv * layer.head_size]
        sizes.append(kv * getattr(layer, "v_head_size", layer.head_size))
        for shard, shape in zip(("q", "k", "v"), _split(name, parameter, sizes), strict=True):
            yield _beside(above, names[shard], name), shape
    elif isinstance(layer, MergedColumnParallelLinear) and names:
        for number, shape in enumerate(_split(name, parameter, layer.output_sizes)):
            yield _beside(above, names.get(number, f"{own}.{number}"), name), shape
    elif hasattr(layer, "org_vocab_size") and parameter.dim() > 1:
        yield _beside(above, own, name), (layer.org_vocab_size, *parameter.shape[1:])
    else:
        yield _beside(prefix, "", name), tuple(parameter.shape)


def _split(name: str, parameter: Any, sizes: list[int]) -> list[Shape]:
    """Shapes of the tensors of a checkpoint that a fused layer's parameter is made of."""
    shape, dim = tuple(parameter.shape), getattr(parameter, "output_dim", None)
    if dim is None:
        return [() if "scale" in name and shape == (len(sizes),) else shape] * len(sizes)
    return [(*shape[:dim], shape[dim] * size // sum(sizes), *shape[dim + 1 :]) for size in sizes]


def _of_experts(above: str, name: str, parameter: Any, experts: Mapping[str, str]) -> Iterator[tuple[str, Shape]]:
    gate, up, down = (experts.get(kind) or f"{kind}_proj" for kind in ("gate", "up", "down"))
    count, *shape = parameter.shape
    fused, _, kind = name.partition("_")
    kind = kind.replace("weight_packed", "weight_packed")
    names = [down] if fused == "w2" else list(dict.fromkeys((gate, up)))
    if len(names) == 2 and shape:
        dim = 1 if getattr(parameter, "is_transposed", False) and len(shape) == 2 else 0
        shape[dim] //= 2
        shape = [] if shape == [1] and parameter.dim() == 2 else shape
    for expert in range(count):
        for part in names:
            yield f"{above}.{expert}.{part}.{kind}", tuple(shape)


def _beside(above: str, own: str, name: str) -> str:
    return ".".join(filter(None, (above, own, name)))


def _before_rewriting(name: str, sources: str) -> str:
    """The name of a draft model's tensor, before its load_weights puts it where the model has it."""
    if _UNPREFIXED in sources:
        name = name.removeprefix("model.")
    if _OF_MTP in sources and name.startswith("model.") and "embed_tokens" not in name:
        name = "mtp." + name.removeprefix("model.")
    return name.replace(".mtp_block.", ".")


def _original(name: str, model: Any) -> str:
    """The name that the model's mapper makes ``name`` of; ``name`` where there is none, or that is not found."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return name
    found = name
    for original, new in mapper.orig_to_new_suffix.items():
        if new and found.endswith(new):
            found = found.removesuffix(new) + original
            break
    for original, new in mapper.orig_to_new_prefix.items():
        if new and found.startswith(new) and not found.startswith(original):
            found = original + found.removeprefix(new)
            break
    for original, new in mapper.orig_to_new_substr.items():
        if new and new in found and original not in found:
            found = found.replace(new, original, 1)
    return found if mapper.map_name(found) == name else name
