"""SGLang: the option --model-loader-extra-config as this package's settings."""

from __future__ import annotations

import json
from typing import Any

from ...errors import SettingsError
from ...settings import LoaderSettings, load_settings
from ..common.options import split_options


def settings_of(extra_config: Any) -> tuple[LoaderSettings, dict[str, Any]]:
    """This package's settings with the option's values, and these values.

    Args:
        extra_config: the option as it stands on the command line (JSON), or parsed; empty or None: no values.

    Raises:
        SettingsError: the option is no JSON, or has an unknown key or a bad value.
    """
    given = extra_config or {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise SettingsError(f"--model-loader-extra-config is no JSON: {error}") from error
    own, _ = split_options(given, engine="SGLang", refused=("enable_multithread_load", "num_threads"))
    return load_settings(own).settings.loader, own
