"""The settings: one typed tree (schema), its layers (layers), and what is said about wrong ones (messages).

Importing this room costs nothing: pydantic, and the building of the tree, are paid for by who first asks for a setting.
Modules that only name the classes in annotations import them under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalogue import describe_settings, setting_value, show_value, variable_name
    from .layers import KNOWN_NAMES, ResolvedSettings
    from .schema import CompileCacheSettings, LoaderSettings, Settings
    from .start_groups import ReportSettings

__all__ = [
    "KNOWN_NAMES",
    "CompileCacheSettings",
    "LoaderSettings",
    "ReportSettings",
    "ResolvedSettings",
    "Settings",
    "describe_settings",
    "load_settings",
    "setting_value",
    "show_value",
    "variable_name",
]

_MODULES = {
    "catalogue": ("describe_settings", "setting_value", "show_value", "variable_name"),
    "layers": ("KNOWN_NAMES", "ResolvedSettings"),
    "schema": ("CompileCacheSettings", "LoaderSettings", "Settings"),
    "start_groups": ("ReportSettings",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_settings(
    extra_config: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    extra_origin: str = "--model-loader-extra-config",
) -> ResolvedSettings:
    """Read all layers. None as a value, and an empty variable, set nothing.

    Args:
        extra_config: the dictionary of ``--model-loader-extra-config``: keys of ``loader``.
        environ: instead of ``os.environ``.
        extra_origin: what messages and origins call ``extra_config``.

    Raises:
        SettingsError: an unknown key or a bad value; it names the file and line or the variable, and what is valid.
            With several, one line for each.
    """
    from .layers import resolve

    return resolve(extra_config or {}, os.environ if environ is None else environ, extra_origin=extra_origin)
