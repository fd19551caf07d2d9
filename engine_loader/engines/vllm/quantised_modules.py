"""vLLM: which modules of a GPTQ or AWQ model are quantised, written down for a checkpoint whose names do not tell.

vLLM finds this out from the names and types in the original's headers, where the configuration does not say it. In a
sharded_state checkpoint modules are fused, and all types are those of parameters: found there, it would be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEYS = ("modules_in_block_to_quantize", "modules_to_not_convert")
"""Of GPTQ and of AWQ: attributes of vLLM's configuration, and keys in the model's."""
_CONFIG = "config.json"
_IN_CONFIG = "quantization_config"
_SEPARATE = ("quantize_config.json", "quant_config.json")


def modules_told_by_headers(config: Any) -> dict[str, list[str]]:
    """Key of the quantisation's configuration -> modules, by the names of the original checkpoint.

    Args:
        config: vLLM's VllmConfig of the original.
    """
    model = config.model_config
    if config.quant_config is None or not any(hasattr(config.quant_config, key) for key in _KEYS):
        return {}
    from vllm.model_executor.model_loader.weight_utils import get_quant_config

    # A new one: the model's class has translated the names of the other.
    fresh = get_quant_config(model, config.load_config)
    before = {key: list(getattr(fresh, key, None) or ()) for key in _KEYS}
    fresh.maybe_update_config(model.model, hf_config=model.hf_config, revision=model.revision)
    after = {key: list(getattr(fresh, key, None) or ()) for key in _KEYS}
    return {key: sorted(modules) for key, modules in after.items() if modules and not before[key]}


def write_modules(directory: Path, modules: Mapping[str, list[str]]) -> None:
    """Add ``modules`` to the quantisation's configuration in ``directory``."""
    if not modules:
        return
    path = directory / _CONFIG
    content = json.loads(path.read_text())
    if _IN_CONFIG in content:
        content[_IN_CONFIG] |= modules
    else:
        path = next(directory / name for name in _SEPARATE if (directory / name).exists())
        content = json.loads(path.read_text()) | modules
    path.write_text(json.dumps(content, indent=2) + "\n")
