"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        area: what it belongs to, e.g. "caches".
        name: what was looked at, e.g. "VLLM_CACHE_ROOT".
        status: "fail": an engine will not start, or not load through this package; "warn": it will be slower, or may
            fail.
        value: what was found.
        mend: how to mend it; empty where there is nothing to mend.
    """

    area: str
    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    mend: str = ""


def installed_version(*distributions: str) -> str | None:
    """The version of the first of ``distributions`` that is installed."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
