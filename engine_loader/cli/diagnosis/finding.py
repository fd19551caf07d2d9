"""The result of a check."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from ...errors import CheckpointError
from ...escaping import printable
from ...settings import LoaderSettings

_TRIES = 2
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        area: the group of findings, e.g. "caches".
        name: the thing that was checked, e.g. "VLLM_CACHE_ROOT".
        status: "fail": an engine will not start, or will not load through this package; "warn": an engine will be
            slower, or may fail; "absent": it is not there, or not switched on, and nothing needs it.
        value: the result of the check.
        repair: what a person can do about a problem; empty if there is no problem.
        detail: what only --verbose shows.
    """

    area: str
    name: str
    status: Literal["ok", "absent", "warn", "fail"]
    value: str
    repair: str = ""
    detail: str = ""


def installed_version(*distributions: str) -> str | None:
    """The version of the first of ``distributions`` that is installed."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def impatient(settings: LoaderSettings) -> LoaderSettings:
    """The settings with which object stores are asked here: one that gives no answer is told in less than a minute."""
    return settings.model_copy(
        update={
            "max_tries": min(settings.max_tries, _TRIES),
            "object_store_timeout_s": min(settings.object_store_timeout_s, _PATIENCE_S),
        }
    )


def cause_and_repair(error: BaseException, otherwise: str) -> tuple[str, str]:
    """What an error says happened, and what it says can be done; ``otherwise`` where it says nothing of that."""
    if isinstance(error, CheckpointError):
        text = str(error)
        return (text.removesuffix(f" ({error.hint})"), error.hint) if error.hint else (text, otherwise)
    notes = "; ".join(getattr(error, "__notes__", ()))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{printable(os.fspath(error.filename))}: {error.strerror}", notes or otherwise
    return str(error), notes or otherwise


def last_line(text: str) -> str:
    """The last line that is not blank: the exception, if the text ends with a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def write_refused(directory: str) -> str | None:
    """Why nothing can be written in a directory, or None. It tries with a temporary file that has no name."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return f"cannot write ({error.strerror})"
