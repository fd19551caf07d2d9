"""What an architecture needs beside the sizes that every one has, and of which class its tiny checkpoint is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How the checkpoint of an architecture is made.

    Attributes:
        config: class of transformers whose configuration serves, where there is none of the architecture's name.
        made_by: class of transformers that makes the weights; None: the one of the architecture's name; "": they are
            what vLLM's model asks for (inverting.py).
        changes: values of the configuration.
        arguments: fields of vLLM's EngineArgs.
        named: what the configuration says that it is, where vLLM finds the architecture by other ways.
        drafts_for: it is a draft model, and this the architecture that it serves; with ``method`` of vLLM's
            speculative_config.
    """

    config: str | None = None
    made_by: str | None = None
    changes: Values = field(default_factory=dict)
    arguments: Values = field(default_factory=dict)
    named: str | None = None
    drafts_for: str | None = None
    method: str | None = None


def family_of(architecture: str) -> Family:
    """How the checkpoint of an architecture is made."""
    family = FAMILIES.get(architecture, Family())
    if architecture.endswith("Model") and family == Family():
        return Family(arguments=_POOLING)
    return family


_POOLING = {"runner": "pooling"}


def _like_llama(**changes: Any) -> Family:
    return Family("LlamaConfig", "", changes)


def _draft(method: str, target: str = "LlamaForCausalLM", config: str = "LlamaConfig", **changes: Any) -> Family:
    return Family(config, "", {"num_hidden_layers": 1, **changes}, drafts_for=target, method=method)


def _dflash() -> Family:
    layers = {"target_layer_ids": [0, 1], "mask_token_id": 5}
    return _draft("dflash", "Qwen3ForCausalLM", "Qwen3Config", dflash_config=layers, block_size=4)


def _by_transformers(made_by: str, **arguments: Any) -> Family:
    """vLLM's layers in a model class of transformers."""
    return Family(made_by=made_by, arguments={"model_impl": "transformers", **arguments}, named=made_by)


_MLA = {"q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "embedding_dropout": 0.0,
}
_ROUTED = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

# Without experts: those that are not gated, vLLM has for GPUs only.
_NEMOTRON_H = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"]}
_HYV3 = {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "qk_norm": True, "route_norm": True}
_MIMO_V2 = {
    "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1],
    "layernorm_epsilon": 1e-5,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window_size": 64,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 32,
}

FAMILIES: dict[str, Family] = {
    # What vLLM reads and transformers has under another name by now, as older configurations have it.
    "AfmoeForCausalLM": Family(
        changes={"n_group": 1, "topk_group": 1, "score_func": "sigmoid", "route_norm": True, "route_scale": 1.0}
    ),
    "Glm4MoeLiteForCausalLM": Family(changes={"first_k_dense_replace": 1}),
    "HYV3ForCausalLM": Family(changes=_HYV3),
    "LongcatFlashForCausalLM": Family(
        changes={"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"}
    ),
    "MiMoV2FlashForCausalLM": Family(changes=_MIMO_V2),
    "MiMoV2ForCausalLM": Family("MiMoV2FlashConfig", "MiMoV2FlashForCausalLM", _MIMO_V2),
    "MiniMaxM2ForCausalLM": Family(changes={"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True}),
    "GPTJForCausalLM": Family(changes={"rotary_dim": 32}),
    "FalconForCausalLM": Family(changes={"new_decoder_architecture": True, "num_kv_heads": 2}),
    "NemotronHForCausalLM": Family(changes=_NEMOTRON_H),
    "NemotronHPuzzleForCausalLM": Family("NemotronHConfig", "NemotronHForCausalLM", _NEMOTRON_H),
    "Zamba2ForCausalLM": Family(
        changes={"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1}
    ),
    "GPT2LMHeadModel": Family(),
    "KimiLinearForCausalLM": Family(arguments={"enable_prefix_caching": True}),
    "ColModernVBertForRetrieval": Family("vllm.ColModernVBertConfig", "", arguments=_POOLING),
    "Llama4ForConditionalGeneration": Family(
        changes={"text_config": {"interleave_moe_layer_step": 1, "moe_layers": [0, 1], "no_rope_layers": [1, 0]}}
    ),
    "Llama4ForCausalLM": Family(
        changes={"interleave_moe_layer_step": 1, "moe_layers": [0, 1], "no_rope_layers": [1, 0]}
    ),
    "QianfanOCRForConditionalGeneration": Family(changes={"vision_config": {"patch_size": 14, "image_size": 56}}),
    "Qwen3OmniMoeForConditionalGeneration": Family(
        changes={"talker_config": {"text_config": {"shared_expert_intermediate_size": 64}}}
    ),
    "AXK1ForCausalLM": Family("AXK1Config", ""),
    "Glm4MoeForCausalLM": Family(changes={"head_dim": 32}),
    "XLMRobertaModel": Family(changes={"position_embedding_type": "absolute"}, arguments=_POOLING),
    "GteModel": Family(changes={"position_embedding_type": "rope"}, arguments=_POOLING),
    "Gemma4ForCausalLM": Family(changes={"layer_types": ["sliding_attention", "full_attention"]}),
    "InklingForCausalLM": Family(changes={"padded_vocab_size": 512}),
    "Lfm2ForCausalLM": Family(
        changes={
            "layer_types": ["conv", "full_attention"],
            "block_dim": 128,
            "block_ff_dim": 256,
            "block_multiple_of": 32,
            "block_auto_adjust_ff_dim": False,
            "block_ffn_dim_multiplier": 1.0,
            "conv_dim": 128,
            "conv_dim_out": 128,
        }
    ),
    "Glm4vMoeForConditionalGeneration": Family(changes={"text_config": {"head_dim": 32, "use_qk_norm": False}}),
    "Qwen3VLMoeForConditionalGeneration": Family(changes={"text_config": {"norm_topk_prob": True}}),
    "TransformersMultiModalMoEForCausalLM": _by_transformers("Qwen3VLMoeForConditionalGeneration"),
    "VoxtralForConditionalGeneration": Family(changes={"audio_config": {"downsample_factor": 4}}),
    "Mamba2ForCausalLM": Family(changes={"num_heads": 8, "head_dim": 32, "n_groups": 2, "state_size": 32}),
    "FalconH1ForCausalLM": Family(changes={"mamba_d_state": 32}),
    "HunYuanDenseV1ForCausalLM": Family(changes={"head_dim": 32}),
    "HunYuanMoEV1ForCausalLM": Family(
        changes={"head_dim": 32, "moe_intermediate_size": [64, 64], "num_shared_expert": [1, 1], "moe_topk": [2, 2]}
    ),
    "NemotronForCausalLM": Family(changes={"head_dim": 32, "num_key_value_heads": 2}),
    "Gemma3nForCausalLM": Family(
        changes={"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "Lfm2MoeForCausalLM": Family(changes={"layer_types": ["conv", "full_attention"]}),
    "DbrxForCausalLM": Family(
        changes={
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000},
            "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "Glm5NextForConditionalGeneration": Family(changes={"text_config": {"num_key_value_heads": 4}}),
    "Ernie4_5_VLMoeForConditionalGeneration": Family(
        changes={
            "text_config": {"moe_intermediate_size": [64, 64], "rope_parameters": {"mrope_section": [6, 6, 4]}},
            "vision_config": {"embed_dim": 128, "mlp_ratio": 2},
        }
    ),
    "CohereCompassForConditionalGeneration": Family(
        changes={
            "text_config": {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e4, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            }
        }
    ),
    "Granite4VisionForConditionalGeneration": Family(
        changes={
            "text_config": {
                "model_type": "granite",
                "attention_multiplier": 1.0,
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
            },
            "spatial_target_layers": [0, 0, 1, 1],
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "downsample_rate": "4/8",
        }
    ),
    "Qwen4ExpForCausalLM": Family(
        changes={
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 16,
            "ngram_vocab_size_base": 512,
            "ple_embed_dim": 64,
        }
    ),
    "Emu3ForConditionalGeneration": Family(
        changes={
            "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6},
            "image_token_id": 5,
            "vq_config": {"base_channels": 32, "codebook_size": 64},
        }
    ),
    "LLaMAForCausalLM": Family("LlamaConfig", "LlamaForCausalLM"),
    "InternLM3ForCausalLM": Family("LlamaConfig", "LlamaForCausalLM"),
    "IQuestCoderForCausalLM": Family("LlamaConfig", "LlamaForCausalLM"),
    "TeleChat3ForCausalLM": Family("LlamaConfig", "LlamaForCausalLM"),
    "MistralLarge3ForCausalLM": Family("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "Rnj1ForCausalLM": Family("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "PhiMoEForCausalLM": Family("PhimoeConfig", "PhimoeForCausalLM"),
    "Qwen2ForRewardModel": Family("Qwen2Config", ""),
    "Qwen2ForProcessRewardModel": Family("Qwen2Config", ""),
    "InternLM2ForRewardModel": _like_llama(bias=False),
    "InternLM2ForCausalLM": _like_llama(bias=False),
    "ExaoneForCausalLM": _like_llama(activation_function="silu", layer_norm_epsilon=1e-5, num_layers=2),
    "ExaoneMoEForCausalLM": Family("ExaoneMoeConfig", "ExaoneMoeForCausalLM"),
    "MiMoForCausalLM": Family("Qwen2Config", "Qwen2ForCausalLM"),
    "MiniCPMForCausalLM": _like_llama(scale_emb=1, dim_model_base=128, scale_depth=1.4, num_experts=0),
    "OrionForCausalLM": _like_llama(),
    "SolarForCausalLM": _like_llama(
        num_hidden_layers=4, bskcn_1=[1], bskcn_2=[2], bskcn_3=[3], bskcn_4=[3], bskcn_tv=[0.9, 0.8]
    ),
    "TeleChat2ForCausalLM": _like_llama(n_head=4, n_layer=2),
    "TeleFLMForCausalLM": _like_llama(use_mup=False),
    "Step1ForCausalLM": _like_llama(),
    "HyperCLOVAXForCausalLM": Family(),
    "IQuestLoopCoderForCausalLM": _like_llama(loop_num=2, loop_window_size=64),
    "BailingMoeForCausalLM": _like_llama(**_EXPERTS, use_bias=False, use_qkv_bias=False),
    "BailingMoeV2ForCausalLM": _like_llama(**_EXPERTS, use_bias=False, use_qkv_bias=False, use_qk_norm=True),
    "Param2MoEForCausalLM": _like_llama(**_EXPERTS, use_qk_norm=True, use_qkv_bias=False, rope_theta=1e4),
    "SarvamMoEForCausalLM": _like_llama(**_EXPERTS, use_qk_norm=True, use_bias=False, use_qkv_bias=False),
    "SarvamMLAForCausalLM": _like_llama(**_EXPERTS, **_MLA, num_key_value_heads=4),
    "DeepseekForCausalLM": Family(
        "DeepseekV2Config", "", {**_ROUTED, "num_key_value_heads": 2, "topk_method": "greedy"}
    ),
    "Step3TextForCausalLM": _like_llama(
        moe_intermediate_size=64,
        moe_num_experts=4,
        moe_top_k=2,
        norm_expert_weight=True,
        share_expert_dim=64,
        share_q_dim=64,
        max_position_embedding=512,
        moe_layers_enum="1",
        num_attention_groups=1,
    ),
    "PanguEmbeddedForCausalLM": _like_llama(bias=True),
    "PanguUltraMoEForCausalLM": _like_llama(**_ROUTED, **_MLA, num_key_value_heads=4, sandwich_norm=True),
    "Plamo3ForCausalLM": _like_llama(
        head_dim=32,
        interleaved_sliding_window=[64, None],
        layer_types=["sliding_attention", "full_attention"],
        rope_local_theta=10000,
        sliding_window=64,
    ),
    "DeciLMForCausalLM": _like_llama(
        block_configs=[
            {
                "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                "ffn": {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False},
            },
        ]
        * 2,
        num_key_value_heads=None,
    ),
    "DeepSeekMTPModel": Family("DeepseekV3Config", "", {"num_nextn_predict_layers": 1}),
    "Glm4MoeMTPModel": Family("Glm4MoeConfig", "", {"head_dim": 32, "num_nextn_predict_layers": 1}),
    "Glm4MoeLiteMTPModel": Family("Glm4MoeLiteConfig", "", {"num_nextn_predict_layers": 1}),
    "MiMoMTPModel": Family("Qwen2Config", "", {"num_nextn_predict_layers": 1}),
    "ErnieMTPModel": Family("Ernie4_5Config", "", {"num_nextn_predict_layers": 1}),
    "Qwen3NextMTP": Family("Qwen3NextConfig", "", {"num_nextn_predict_layers": 1}),
    "Qwen3_5MTP": Family("Qwen3_5TextConfig", "", {"mtp_num_hidden_layers": 1}),
    "Qwen3_5MoeMTP": Family("Qwen3_5MoeTextConfig", "", {"mtp_num_hidden_layers": 1}),
    "ExaoneMoeMTP": Family("ExaoneMoeConfig", "", {"num_nextn_predict_layers": 1}),
    "LongCatFlashMTPModel": Family("LongcatFlashConfig", "", {"num_nextn_predict_layers": 1}),
    "HYV3MTPModel": Family("HYV3Config", "", {**_HYV3, "num_nextn_predict_layers": 1}),
    "OpenPanguMTPModel": _like_llama(**_ROUTED, **_MLA, num_key_value_heads=4, num_nextn_predict_layers=1),
    "LlamaBidirectionalModel": Family("LlamaConfig", "LlamaModel", {"pooling": "avg"}, arguments=_POOLING),
    "LlamaBidirectionalForSequenceClassification": Family(
        "LlamaConfig", "LlamaForSequenceClassification", {"pooling": "avg"}
    ),
    "BertSpladeSparseEmbeddingModel": Family("BertConfig", "BertForMaskedLM"),
    "DeepseekV3BidirectionalModel": Family("DeepseekV3Config", "DeepseekV3Model", arguments=_POOLING),
    "VoyageQwen3BidirectionalEmbedModel": Family("Qwen3Config", "", {"num_labels": 64}, arguments=_POOLING),
    "EagleLlamaForCausalLM": _draft("eagle"),
    "EagleMistralForCausalLM": _draft("eagle", "MistralForCausalLM", "MistralConfig"),
    "EagleMiniCPMForCausalLM": _draft("eagle", scale_emb=1, dim_model_base=128, scale_depth=1.4, num_experts=0),
    "EagleCohereForCausalLM": _draft("eagle", "CohereForCausalLM", "CohereConfig"),
    "Eagle3LlamaForCausalLM": _draft("eagle3", draft_vocab_size=256),
    "LlamaForCausalLMEagle3": _draft("eagle3", draft_vocab_size=256),
    "PEagleDraftModel": _draft("eagle3", draft_vocab_size=512),
    "PeagleLlamaForCausalLM": _draft("eagle3", draft_vocab_size=512),
    "Eagle3MiniMaxM2ForCausalLM": _draft("eagle3", draft_vocab_size=512),
    "Eagle3Qwen3ForCausalLM": _draft("eagle3", "Qwen3ForCausalLM", "Qwen3Config", draft_vocab_size=256),
    "PeagleQwen3ForCausalLM": _draft("eagle3", "Qwen3ForCausalLM", "Qwen3Config", draft_vocab_size=512),
    "Eagle3DeepseekV2ForCausalLM": _draft("eagle3", "DeepseekV3ForCausalLM", "DeepseekV3Config", draft_vocab_size=256),
    "Eagle3DeepseekV3ForCausalLM": _draft("eagle3", "DeepseekV3ForCausalLM", "DeepseekV3Config", draft_vocab_size=256),
    "DFlashDraftModel": _dflash(),
    "DFlash2DraftModel": _dflash(),
    "TransformersForCausalLM": _by_transformers("LlamaForCausalLM"),
    "TransformersMoEForCausalLM": _by_transformers("Qwen3MoeForCausalLM"),
    "TransformersMultiModalForCausalLM": _by_transformers("LlavaForConditionalGeneration"),
    "TransformersEmbeddingModel": _by_transformers("LlamaModel", runner="pooling"),
    "TransformersMoEEmbeddingModel": _by_transformers("Qwen3MoeModel", runner="pooling"),
    "TransformersMultiModalEmbeddingModel": _by_transformers("Qwen2VLModel", runner="pooling"),
    "TransformersForSequenceClassification": _by_transformers("LlamaForSequenceClassification", runner="pooling"),
    "TransformersMoEForSequenceClassification": _by_transformers("MixtralForSequenceClassification", runner="pooling"),
    "ChatGLMModel": Family("vllm.ChatGLMConfig", ""),
    "ChatGLMForConditionalGeneration": Family("vllm.ChatGLMConfig", ""),
    "Step3p5ForCausalLM": Family("vllm.Step3p5Config", ""),
}
