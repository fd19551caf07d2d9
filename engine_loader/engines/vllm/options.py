"""vLLM: the option --model-loader-extra-config, split into this package's settings and vLLM's own keys."""

from __future__ import annotations

from typing import Any

from ...settings import LoaderSettings, load_settings
from ..common.options import split_options

_ENGINE_KEYS = frozenset({"enable_weights_track"})
"""Keys that vLLM's default loader takes and that mean something with this reader."""


def settings_of(extra_config: Any) -> tuple[LoaderSettings, dict[str, Any]]:
    """This package's settings with the option's values, and the keys that stay vLLM's.

    Raises:
        SettingsError: the option has an unknown key or a bad value.
    """
    refused = ("enable_multithread_load", "num_threads")
    own, engine = split_options(extra_config, engine="vLLM", kept=_ENGINE_KEYS, refused=refused)
    return load_settings(own).settings.loader, engine
