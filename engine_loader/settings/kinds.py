"""Kinds of values that settings have: left to this package, sizes; and what every group of settings checks."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, ValidationInfo, field_validator

_KUBERNETES_SIZE = re.compile(r"[0-9.]+\s*[KMGTP]i")

_T = TypeVar("_T")


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


Auto = Annotated[_T | None, BeforeValidator(_auto_is_none)]
"""A value that a user may leave to this package by writing ``auto``, which is None here.

Limits belong to the value: ``Auto[Annotated[int, Field(ge=1)]]``, for None has no order.
"""


def _as_kubernetes_writes(value: Any) -> Any:
    return f"{value.strip()}B" if isinstance(value, str) and _KUBERNETES_SIZE.fullmatch(value.strip()) else value


Size = Annotated[ByteSize, BeforeValidator(_as_kubernetes_writes)]
"""Bytes, also as ``512MiB``, ``1GB``, and as in a pod's limits, ``512Mi``."""


class SettingsGroup(BaseModel):
    """Settings that stand together. An unknown name in it is an error."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else bool
        for flag, word in ((False, "off"), (True, "on")):
            if value is flag and word in get_args(annotation):
                return word  # as YAML takes it
        # pydantic takes true for 1: `threads: true` would be one thread.
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("this takes neither true nor false")
        return value
