"""The option --model-loader-extra-config: this package's keys, and the engine's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import SettingsError


def split_options(
    extra_config: Any, *, engine: str, kept: Collection[str] = (), refused: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the value of --model-loader-extra-config into this package's keys and the engine's.

    Args:
        extra_config: the value of the option.
        engine: the engine's name, for messages.
        kept: keys that stay the engine's.
        refused: keys that the engine's own reader takes and that would do nothing here.

    Returns:
        This package's keys with their values, and those of ``kept`` with theirs.

    Raises:
        SettingsError: the value is no mapping, or has a key of ``refused``.
    """
    if not isinstance(extra_config, Mapping):
        raise SettingsError(f"--model-loader-extra-config must be a JSON object, not {type(extra_config).__name__}")
    for key in refused:
        if key in extra_config:
            raise SettingsError(f"--model-loader-extra-config: {key} is for {engine}'s own reader; here, set threads")
    own = {key: value for key, value in extra_config.items() if key not in kept}
    return own, {key: value for key, value in extra_config.items() if key in kept}
