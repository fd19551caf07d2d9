"""Shrinks a transformers configuration to a model of a few hundred kilobytes of the same make.

Fields that say a size are known by their names, whatever the architecture; what a family needs beside them is in
families.py. Sub-configurations (a vision tower, a text model) are shrunk in the same way, so that widths agree where
one part hands its output to another.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 128, 4, 2, 32, 2, 512

_RULES: list[tuple[str, Any]] = [
    (r"first_k_dense_replace|num_dense\w*|moe_layer_start_index", 1),
    (r"mamba_(num|n)_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 32),
    (r"mamba_d_ssm", 256),
    (r"vocab_size|padded_vocab_size|text_vocab_size|unpadded_vocab_size", VOCAB),
    (r"(\w+_)?vocab_size(_\w+)?", 64),
    (r"num_(hidden_)?layers|n_layers?|num_layers|depth|layers|(num_)?(encoder|decoder)_layers", LAYERS),
    (r"(num_|n_)(\w+_)?layers|\w+_num_hidden_layers|(num_)?\w+_(layers|depth)", LAYERS),
    (r"num_(key_value|kv)_heads|n_kv_heads|num_query_groups|multi_query_group_num|kv_n_heads", KV_HEADS),
    (r"\w+_(num_key_value_heads)|num_global_key_value_heads|swa_num_key_value_heads", KV_HEADS),
    (r"(\w*(num|n)_)?(attention_|attn_)?heads?|n_heads?|num_heads", HEADS),
    (r"(encoder|decoder)_attention_heads|\w+_(num|n)_(attention_)?heads|num_\w+_attention_heads", HEADS),
    (r"head_dim|attention_head_dim|kv_channels|qk_nope_head_dim|v_head_dim|head_size", HEAD_DIM),
    (r"qk_rope_head_dim|rope_head_dim", HEAD_DIM),
    (r"(index|global|swa|linear|mamba|local)_(\w+_)?head_dim|swa_v_head_dim|index_head_dim", HEAD_DIM),
    (r"kv_lora_rank", 64),
    (r"q_lora_rank", 48),
    (r"(moe|expert|routed_expert)_(intermediate|ffn_hidden|hidden)_size|expert_ffn_hidden_size|moe_\w*dim", 64),
    (r"\w*shared_expert_intermediate_size|shared_intermediate_size|moe_shared_\w*size", 64),
    (r"\w*intermediate_size\w*|ffn_dim|d_ff|n_inner|ffn_hidden_size|intermediate_dim|mlp_dim", 256),
    (r"(encoder|decoder)_ffn_dim|\w*ffn_(hidden_size|dim)|mlp_hidden_size", 256),
    (r"(\w+_)?(hidden_size|hidden_dim|embed_dim|embedding_size|d_model|n_embd|proj_dim|projection_dim)", HIDDEN),
    (r"embed_dim|dim|width|emb_dim|hidden_channels|mlp_bias_dim|conv_dim|output_dim|input_dim", HIDDEN),
    (r"word_embed_proj_dim|(\w+_)?hidden_size_\w+|(\w+_)?(out|output|input)_(hidden_)?(size|dim)", HIDDEN),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_routed_experts|n_experts", 4),
    (
        r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|num_experts_per_topk|moe_top_k|router_topk|n_activated_experts",
        2,
    ),
    (r"n_shared_experts|num_shared_experts?|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_groups?|n_expert_groups?", 1),
    (
        r"max_position_embeddings|n_positions|max_sequence_length|max_seq_len(gth)?|n_ctx|seq_length|model_max_length",
        512,
    ),
    (r"max_target_positions|max_source_positions|original_max_position_embeddings", 512),
    (r"image_size|img_size", 56),
    (r"patch_size", 14),
    (r"sliding_window|attention_chunk_size|window_size|local_attention", 64),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)", 16),
    (r"mamba_n_groups|n_groups", 1),
    (r"mamba_dt_rank|time_step_rank", 16),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"num_nextn_predict_layers|num_mtp_\w+|mtp_num_\w+", 1),
]
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_PER_LAYER = re.compile(
    r"layer_types|layers_block_type|mlp_layer_types|\w*layer_types|no_rope_layers|block_types?|attn_type_list|moe_layer_freq|hybrid_layer_pattern|layers_\w+"
)
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_OF_NO_MODEL = ("transformers_version", "_name_or_path", "architectures", "output_attentions")
_TOKEN = re.compile(r"\w*token_(id|index|ids)|\w+_id|\w+_token")


def shrunk(values: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A copy of a configuration's ``to_dict()`` with small sizes.

    Args:
        values: the configuration.
        changes: what is set in the end; a mapping for a sub-configuration is merged into it.
    """
    result = {name: _shrunk_value(name, value) for name, value in values.items() if name not in _OF_NO_MODEL}
    layers = int((changes or {}).get("num_hidden_layers", LAYERS))
    before = next((values[name] for name in _LAYER_COUNTS if values.get(name)), None)
    for name, value in result.items():
        if isinstance(value, list) and value and (len(value) == before or _PER_LAYER.fullmatch(name)):
            result[name] = [_shrunk_value(name, kind) for kind in _spread(value, layers)]
    if "per_layer_config" in result:
        result["per_layer_config"] = {}
    if "head_dim" in result and result["head_dim"] is None:
        result["head_dim"] = HEAD_DIM
    _fit_rope(result, changes or {})
    return merged(result, changes or {})


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes``; those of a sub-configuration are merged into it."""
    result = dict(values)
    for name, value in changes.items():
        inner = result.get(name)
        result[name] = merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return result


def _shrunk_value(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return shrunk(value) if name.endswith("config") or "model_type" in value else dict(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if _TOKEN.fullmatch(name):
            return value if 0 <= value < VOCAB else 5
        return next((small for pattern, small in _COMPILED if pattern.fullmatch(name)), value)
    return value


def _spread(values: list[Any], count: int) -> list[Any]:
    """So many of a list, with as many kinds of what it holds as there is room for."""
    kinds = [kind for at, kind in enumerate(values) if kind not in values[:at]]
    chosen = (kinds + values)[:count] if len(kinds) > 1 else values[:count]
    return chosen + [values[-1]] * (count - len(chosen))


def _fit_rope(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """The sections of a rotary embedding add up to half of a head."""
    head_dim = changes.get("head_dim") or values.get("head_dim") or HEAD_DIM
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        for inner in _ropes(rope):
            section = inner.get("mrope_section")
            if section:
                half = int(head_dim * inner.get("partial_rotary_factor", 1.0)) // 2
                parts = [max(1, size * half // sum(section)) for size in section]
                parts[0] += half - sum(parts)
                inner["mrope_section"] = parts
            for factors in ("short_factor", "long_factor"):
                if factors in inner:
                    inner[factors] = [1.0] * (head_dim // 2)


def _ropes(rope: Any) -> Iterable[dict[str, Any]]:
    if isinstance(rope, dict):
        yield rope
        for inner in rope.values():
            yield from _ropes(inner)
