"""vLLM: the daemons of ``vllm preload``, which load a model and hand its weights to engines.

They are spawned without plugins, with the configuration of the engine. Read in vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from ..common.children import register_in_receivers


def register() -> None:
    """Have the daemons' processes register the load format, as vLLM's module of daemons is imported."""
    from vllm.config import VllmConfig

    register_in_receivers(VllmConfig, lambda config: config.load_config.load_format)
