"""The settings: one typed tree (schema), its layers (layers), and what is said about wrong ones (messages)."""

from .catalogue import describe_settings, setting_value, show_value, variable_name
from .layers import KNOWN_NAMES, ResolvedSettings, load_settings
from .schema import CompileCacheSettings, LoaderSettings, ReportSettings, Settings

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
