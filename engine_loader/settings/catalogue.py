"""Every setting by its dotted name (``loader.threads``): default, meaning, variable, and how a value is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ByteSize

from .schema import Settings

PREFIX = "ENGINE_LOADER_"
_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass(frozen=True)
class Setting:
    """A setting's default and its meaning."""

    default: Any
    description: str


def fields(group: type[BaseModel] = Settings, prefix: str = "") -> dict[str, Setting]:
    """Every setting by its dotted name."""
    found: dict[str, Setting] = {}
    for name, info in group.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= fields(info.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = Setting(info.default, info.description or "")
    return found


def groups() -> set[str]:
    """The dotted names of the groups of settings."""
    return {name.rpartition(".")[0] for name in fields() if "." in name}


def describe_settings() -> Iterator[tuple[str, str, str]]:
    """(dotted name, default, description) of every setting."""
    for name, setting in fields().items():
        yield name, show_value(setting.default), setting.description


def setting_value(settings: Settings, name: str) -> Any:
    """The value of the setting with the dotted ``name``."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def variable_name(name: str) -> str:
    """The environment variable that sets the setting with the dotted ``name``."""
    return PREFIX + name.replace(".", "__").upper()


def show_value(value: object) -> str:
    """A setting's value as a person writes it, in a form that can be given back."""
    if isinstance(value, ByteSize):
        for unit, name in _UNITS:
            if value and value % unit == 0:
                return f"{value // unit} {name}"
        return str(int(value))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict | list):
        return json.dumps(value)
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
