"""SGLang: what its servers are asked for that this package's loader cannot serve, refused with what to do instead.

SGLang has loaders of its own for some quantisations and for its weight cache, which read past the load format. Nothing
here imports SGLang or torch.
"""

from __future__ import annotations

from typing import Any

from ...errors import SettingsError
from ...plugin import LOAD_FORMAT

_OWN_LOADERS = ("auto-round-int8", "bitsandbytes", "gguf")
_MODELOPT = ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mixed")


def bypassed(what: str) -> SettingsError:
    """An error that says what SGLang does past this package's loader (``what``: the predicate), and what to do."""
    return SettingsError(
        f"--load-format {LOAD_FORMAT} cannot serve here: SGLang {what}. "
        "Start with --load-format auto, or serve a checkpoint that is quantised already"
    )


def refuse_quantization(config: Any) -> None:
    """Refuse a quantisation that SGLang has a loader of its own for.

    Args:
        config: SGLang's ServerArgs or ModelConfig.

    Raises:
        SettingsError: ``config`` asks for such a quantisation.
    """
    if getattr(config, "modelopt_quant", None):
        raise bypassed("quantises the model by ModelOpt while it loads it")
    quantization = getattr(config, "quantization", None)
    if quantization in _OWN_LOADERS:
        raise bypassed(f"has a loader of its own for the quantisation {quantization}")


def refuse_model(model_config: Any) -> None:
    """Refuse a model that SGLang quantises while it loads it, or has a loader of its own for.

    Args:
        model_config: SGLang's ModelConfig, which knows whether the checkpoint is quantised already.

    Raises:
        SettingsError: SGLang would read the weights in its own way.
    """
    refuse_quantization(model_config)
    quantization = getattr(model_config, "quantization", None)
    if quantization in _MODELOPT and not model_config._is_already_quantized():
        raise bypassed("quantises the model by ModelOpt while it loads it")


def refuse_overlap(config: Any) -> None:
    """Refuse to load weights while kernels are captured: SGLang does this with its own loader only.

    Args:
        config: SGLang's ServerArgs.

    Raises:
        SettingsError: --startup-weight-load-mode overlap is asked for.
    """
    mode = getattr(config, "startup_weight_load_mode", None)
    if getattr(mode, "value", mode) == "overlap":
        raise SettingsError(
            f"--load-format {LOAD_FORMAT} and --startup-weight-load-mode overlap exclude each other: SGLang overlaps "
            "with its own loader only. Leave one of them out"
        )


def refuse_weight_cache(config: Any) -> None:
    """Refuse SGLang's weight cache.

    Args:
        config: SGLang's ServerArgs or LoadConfig.

    Raises:
        SettingsError: the weight cache is switched on.
    """
    mode = getattr(config, "weight_cache_mode", "off")
    if mode != "off":
        raise SettingsError(
            f"--load-format {LOAD_FORMAT} and --weight-cache-mode {mode} exclude each other: the weight cache has a "
            "loader of its own. Leave one of them out"
        )
