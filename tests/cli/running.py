"""Runs the command, in this process or as a user does."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from engine_loader.cli import app

COMMAND = [sys.executable, "-m", "engine_loader"]


def invoke(*arguments: str | Path, env: Mapping[str, str | None] | None = None) -> Result:
    """In this process. ``env`` is laid over the environment; None takes a variable away."""
    return CliRunner().invoke(app, list(map(str, arguments)), env=_clean(env))


def run(
    *arguments: str | Path, env: Mapping[str, str | None] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    environ = {key: value for key, value in {**os.environ, **_clean(env)}.items() if value is not None}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


def _clean(env: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """Without the settings of whoever runs the tests."""
    ours: dict[str, str | None] = {
        name: None for name in os.environ if name.startswith(("ENGINE_LOADER_", "VLLM_PLUGINS"))
    }
    return {**ours, "COLUMNS": "200", **(env or {})}
