"""Layouts by name, as ``key_mapping: torchtitan-llama``: how trainings call and order what transformers has otherwise.

Facts: torchtitan's ``torchtitan/models/*/model/state_dict_adapter.py``; Meta's published Llama, whose names and order
torchtitan's Llama has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...errors import CheckpointError
from .rules import Rule, parse_rules

_OUTER = (("tok_embeddings", "model.embed_tokens"), ("norm", "model.norm"), ("output", "lm_head"))
_LAYER = (
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
)
_ROTATED = (("attention.wq", "self_attn.q_proj"), ("attention.wk", "self_attn.k_proj"))
_NORMS = (("attention.q_norm", "self_attn.q_norm"), ("attention.k_norm", "self_attn.k_norm"))
_DENSE = (
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
)
_ROUTER = (("moe.router.gate", "mlp.gate"),)
_SHARED = (
    ("moe.shared_experts.w1", "mlp.shared_experts.gate_proj"),
    ("moe.shared_experts.w2", "mlp.shared_experts.down_proj"),
    ("moe.shared_experts.w3", "mlp.shared_experts.up_proj"),
)
_LATENT = (
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wq_a", "self_attn.q_a_proj"),
    ("attention.q_norm", "self_attn.q_a_layernorm"),
    ("attention.wq_b", "self_attn.q_b_proj"),
    ("attention.wkv_a", "self_attn.kv_a_proj_with_mqa"),
    ("attention.kv_norm", "self_attn.kv_a_layernorm"),
    ("attention.wkv_b", "self_attn.kv_b_proj"),
)
_HALVED = ("torchtitan-llama", "meta-llama")
_SETTING = re.compile(r"(torchtitan-llama|meta-llama)(?::(\d+))?|torchtitan-(?:llama4|qwen3|deepseek_v3)")
_INTERLEAVED = re.compile(r"(?:^|[.])attention[.]w([qk])[.](?:weight|bias)$")
"""The rotated pairs are neighbouring rows here, and half a head apart in transformers and the engines."""
_WRAPPER = "model."
"""Before the names, where a training saved ``{"model": model.state_dict()}``."""


def is_layout(mapping: object) -> bool:
    """Whether a ``key_mapping`` is the name of a built-in one."""
    return isinstance(mapping, str) and _SETTING.fullmatch(mapping) is not None


def rules_of(mapping: object, head_dim: Callable[[], int | None] = lambda: 2) -> list[Rule] | None:
    """The rules of a ``key_mapping``, from the training's tensors to transformers'; None where it has none.

    Args:
        mapping: any.
        head_dim: finds the rows of a head, where the layout needs them and ``mapping`` does not tell.

    Raises:
        SettingsError: a rule makes no sense.
        CheckpointError: the rows of a head are neither given nor found.
    """
    if isinstance(mapping, Sequence) and not isinstance(mapping, str):
        return parse_rules(mapping)
    found = _SETTING.fullmatch(mapping) if isinstance(mapping, str) else None
    if found is None:
        return None
    layout = found[1] or mapping
    if layout in _HALVED:
        rows = int(found[2]) if found[2] else head_dim()
        if rows is None or rows < 2 or rows % 2:
            raise CheckpointError(
                f"key_mapping={mapping} needs the number of rows of a head, an even number, which no config.json "
                "beside the checkpoint tells",
                hint=f"give it: key_mapping={layout}:128, or put the model's config.json there",
            )
        return [*_llama(rows), Rule(("freqs_cis",), ()), Rule(("rope.freqs",), ())]
    if layout == "torchtitan-qwen3":
        return [*_outer(), *_layers(_LAYER + _ROTATED + _NORMS + _DENSE + _ROUTER), *_experts()]
    if layout == "torchtitan-deepseek_v3":
        bias = Rule(("layers.{l}.moe.expert_bias",), ("model.layers.{l}.mlp.gate.e_score_correction_bias",))
        # Before the router's weights, whose names it would fit on the way back.
        return [bias, *_outer(), *_layers(_LAYER + _LATENT + _DENSE + _ROUTER + _SHARED), *_experts()]
    return _llama4()


def unwrapped(name: str, mapping: object) -> str:
    """A name without what stands before it in a training's state dict; of built-in layouts only."""
    return name.removeprefix(_WRAPPER) if is_layout(mapping) else name


def misread_layout(renamed: Iterable[tuple[str, str]]) -> str | None:
    """A warning where (name, new name) show torchtitan's Llama, renamed to transformers' names and not reordered."""
    for name, new in renamed:
        found = _INTERLEAVED.search(name)
        if found is not None and f"{found[1]}_proj" in new:
            return (
                f"{name!r} looks like torchtitan's Llama, whose rows of wq and wk are in another order than those of "
                f"{new!r}: a model with only the names changed gives wrong answers, unless the training has them in "
                "transformers' order"
            )
    return None


def _outer() -> list[Rule]:
    return [Rule((f"{theirs}.{{w}}",), (f"{ours}.{{w}}",)) for theirs, ours in _OUTER]


def _layers(names: Iterable[tuple[str, str]], **change: Any) -> list[Rule]:
    return [
        Rule((f"layers.{{l}}.{theirs}.{{w}}",), (f"model.layers.{{l}}.{ours}.{{w}}",), **change)
        for theirs, ours in names
    ]


def _experts() -> list[Rule]:
    return [
        Rule(
            (f"layers.{{l}}.moe.experts.{theirs}",),
            (f"model.layers.{{l}}.mlp.experts.{{e}}.{ours}.weight",),
            combine="unstack",
        )
        for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ]


def _llama(head_dim: int) -> list[Rule]:
    rotated = _layers(_ROTATED, rows="pairs_to_halves", head_dim=head_dim)
    return [*_outer(), *_layers(_LAYER + _DENSE), *rotated]


def _llama4() -> list[Rule]:
    """Both have neighbouring pairs in wq and wk; the experts' matrices are the other way round."""
    prefix, layer = "language_model.", "language_model.model.layers.{l}."
    shared = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    experts = "layers.{l}.moe.experts."
    return [
        *[Rule((f"{theirs}.{{w}}",), (f"{prefix}{ours}.{{w}}",)) for theirs, ours in _OUTER],
        *[
            Rule((f"layers.{{l}}.{theirs}.{{w}}",), (f"{layer}{ours}.{{w}}",))
            for theirs, ours in (*_LAYER, *_ROTATED, ("moe.router.gate", "feed_forward.router"))
        ],
        *[
            Rule(
                (f"layers.{{l}}.moe.shared_experts.{theirs}.{{w}}",),
                (f"{layer}feed_forward.shared_expert.{ours}.{{w}}",),
            )
            for theirs, ours in shared
        ],
        Rule((f"{experts}w2",), (f"{layer}feed_forward.experts.down_proj",), transpose=True),
        Rule(
            (f"{experts}w1", f"{experts}w3"),
            (f"{layer}feed_forward.experts.gate_up_proj",),
            transpose=True,
            combine="join",
            dim=-1,
        ),
        Rule(("layers.{l}.moe.expert_bias",), ()),
        Rule(("freqs_cis",), ()),
    ]
