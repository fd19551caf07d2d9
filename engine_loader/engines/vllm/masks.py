"""vLLM: which of its own formats this package's loader passes for, so that vLLM picks the files that it would pick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

MISTRAL_PATTERNS = ("consolidated*.safetensors", "*.safetensors")
"""Where a model's configuration is Mistral's, its weights are the first of these that there are."""


def mask_of(model_config: Any) -> str:
    """The format of vLLM's whose files are this model's.

    "mistral" for a model whose configuration is Mistral's own (params.json): its weights are named for it, and lie
    beside others for transformers. Else "hf": safetensors files, or, where a model has none, PyTorch's, which vLLM's
    own reader reads. Not "auto": that takes consolidated files also for a model that is configured for transformers.
    """
    from vllm.model_executor import model_loader

    if "hf" not in get_args(getattr(model_loader, "LoadFormats", None)):
        return "safetensors"  # of older versions
    return "mistral" if _is_configured_by_mistral(model_config) else "hf"


def patterns_of(mask: str, patterns: Sequence[str] | None) -> Sequence[str] | None:
    """``patterns`` that a model has of its own, else those of the mask, else None: all safetensors files."""
    return MISTRAL_PATTERNS if not patterns and mask == "mistral" else patterns


def _is_configured_by_mistral(model_config: Any) -> bool:
    asked = getattr(model_config, "config_format", None)
    if asked != "auto":
        return bool(asked == "mistral")
    from vllm.transformers_utils.config import MISTRAL_CONFIG_NAME
    from vllm.transformers_utils.repo_utils import file_or_path_exists, is_mistral_model_repo

    model, revision = model_config.model, getattr(model_config, "revision", None)
    # As vLLM chooses the configuration.
    return bool(
        is_mistral_model_repo(model_name_or_path=str(model), revision=revision)
        and file_or_path_exists(model=model, config_name=MISTRAL_CONFIG_NAME, revision=revision)
    )
