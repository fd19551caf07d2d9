"""Versions of engines, torch and Python, read from files: importing them takes seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

NONE = "none"
"""In the place of a version of what is not installed."""


def module_version(module: str) -> str:
    """The version of an engine as it calls itself: its distribution may have another name."""
    text = _file_of(module, "_version.py")
    found = re.search(r"^(?:__version__\s*=\s*)?version\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else distribution_version(module)


def python_version() -> str:
    """Without the patch level: byte code, pickles and binary interfaces are those of the minor version."""
    return f"{sys.version_info.major}.{sys.version_info.minor}{sys.abiflags}"


@cache
def torch_versions() -> dict[str, str]:
    """torch's version and what it was built for: "torch", "cuda", "hip"; empty where it was not built for that."""
    versions = {"torch": distribution_version("torch"), "cuda": "", "hip": ""}
    text = _file_of("torch", "version.py")
    for name in ("cuda", "hip"):
        if found := re.search(rf"^{name}\s*(?::[^=]*)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
            versions[name] = found[1]
    if found := re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
        versions["torch"] = found[1]  # with the local part (+cu130) that the metadata may lack
    return versions


def distribution_version(*distributions: str) -> str:
    """The version of the first of these that is installed; NONE where none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return NONE


def _file_of(module: str, name: str) -> str:
    """The text of a file beside a module's own; empty where it cannot be read."""
    try:
        spec = importlib.util.find_spec(module)
        return Path(spec.origin).with_name(name).read_text() if spec is not None and spec.origin else ""
    except (OSError, ValueError):
        return ""
