"""Layouts by name, as ``key_mapping: torchtitan-llama``: how trainings call and order what transformers has otherwise.

Facts: torchtitan's ``torchtitan/models/*/model/state_dict_adapter.py``; torchtune's
``torchtune/models/convert_weights.py``; Meta's published Llama, whose order both have, and torchtitan the names, too;
Megatron Core's ``megatron/core/transformer/attention.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ...errors import CheckpointError
from ...settings.layout_names import LAYOUT_NAME
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
_TUNE = (
    ("attn.v_proj", "self_attn.v_proj"),
    ("attn.output_proj", "self_attn.o_proj"),
    ("mlp.w1", "mlp.gate_proj"),
    ("mlp.w2", "mlp.down_proj"),
    ("mlp.w3", "mlp.up_proj"),
)
_TUNE_ROTATED = (("attn.q_proj", "self_attn.q_proj"), ("attn.k_proj", "self_attn.k_proj"))
_TUNE_NORMS = (("sa_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
_HALVED = ("torchtitan-llama", "meta-llama", "torchtune-llama")


class _Misread(NamedTuple):
    """Names by which tensors are told that a rename alone gets wrong.

    Attributes:
        name: of such a tensor in the training.
        new: begins the last parts of its new name; its braces stand for what ``name`` has in its group.
        only_with, not_with: what another name in the checkpoint must have, and none may have.
        warning: has the two names put into it.
    """

    name: re.Pattern[str]
    new: str
    only_with: re.Pattern[str] | None
    not_with: re.Pattern[str] | None
    warning: str


def _in_pairs(whose: str, which: str, layout: str) -> str:
    """The warning of rotated pairs that are neighbouring rows, and half a head apart in transformers."""
    return (
        f"{{0!r}} looks like {whose}, whose rows of {which} are in another order than those of {{1!r}}: a model with "
        "only the names changed gives wrong answers, unless the training has them in transformers' order; "
        f"key_mapping={layout} reorders them"
    )


_MISREAD = (
    _Misread(
        re.compile(r"(?:^|[.])attention[.]w([qk])[.](?:weight|bias)$"),
        "{}_proj",
        None,
        re.compile(r"(?:^|[.])(?:attention[.](?:[qk]_norm|kv_norm|wkv_[ab])|moe)[.]"),  # its Qwen3, DeepSeek, Llama 4
        _in_pairs("torchtitan's Llama", "wq and wk", "torchtitan-llama"),
    ),
    _Misread(
        re.compile(r"(?:^|[.])attn[.]([qk])_proj[.]weight$"),
        "self_attn.{}_proj",
        re.compile(r"[.]sa_norm[.]scale$"),
        re.compile(r"[.]attn[.](?:[qk]_norm[.]|q_proj[.]bias$)"),  # its Qwen models
        _in_pairs("torchtune's Llama", "q_proj and k_proj", "torchtune-llama"),
    ),
    _Misread(
        re.compile(r"(?:^|[.])linear_(qkv)[.](?:weight|bias)$"),
        "{}",
        None,
        None,
        "{0!r} looks like Megatron's, which has queries, keys and values group by group, and the engines have all "
        "queries first: as {1!r}, with only the name changed, the model gives wrong answers; let Megatron Bridge "
        "export it to transformers' layout",
    ),
)
_WRAPPER = "model."
"""Before the names, where a training saved ``{"model": model.state_dict()}``."""


def is_layout(mapping: object) -> bool:
    """Whether a ``key_mapping`` is the name of a built-in one."""
    return isinstance(mapping, str) and LAYOUT_NAME.fullmatch(mapping) is not None


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
    found = LAYOUT_NAME.fullmatch(mapping) if isinstance(mapping, str) else None
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
        if layout == "torchtune-llama":
            return _torchtune(rows)
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
    """A warning where (name, new name) show a layout that has only been renamed, and differs by more than names."""
    pairs = list(renamed)
    for kind in _MISREAD:
        if kind.only_with is not None and not any(kind.only_with.search(name) for name, _ in pairs):
            continue
        if kind.not_with is not None and any(kind.not_with.search(name) for name, _ in pairs):
            continue
        for name, new in pairs:
            found = kind.name.search(name)
            if found is not None and new != name and kind.new.format(found[1]) in new:
                return kind.warning.format(name, new)
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


def _torchtune(head_dim: int) -> list[Rule]:
    outer = (("tok_embeddings.weight", "model.embed_tokens.weight"), ("norm.scale", "model.norm.weight"))
    norms = [
        Rule((f"layers.{{l}}.{theirs}.scale",), (f"model.layers.{{l}}.{ours}.weight",)) for theirs, ours in _TUNE_NORMS
    ]
    rotated = _layers(_TUNE_ROTATED, rows="pairs_to_halves", head_dim=head_dim)
    names = [Rule((theirs,), (ours,)) for theirs, ours in (*outer, ("output.weight", "lm_head.weight"))]
    return [*names, *_layers(_TUNE), *norms, *rotated]


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
