"""Runs the command, in this process or as a user does."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from engine_loader.cli import app

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
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


def on_terminal(
    arguments: list[str],
    interrupt_at: str | None = None,
    timeout_s: float = 240,
    columns: int = 200,
    command: Sequence[str] = COMMAND,
) -> tuple[int, str]:
    """Run the command on a terminal of its own and press Ctrl-C when a text appears; its status and what it showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"COLUMNS": str(columns), "TERM": "xterm-256color"}
        os.execv(command[0], [*command, *arguments])
    output, interrupted, end = "", False, time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            try:
                if not select.select([terminal], [], [], 0.5)[0]:
                    continue
                piece = os.read(terminal, 65536)
            except OSError:  # the terminal of a process that has ended
                break
            output += piece.decode(errors="replace")
            if interrupt_at is not None and not interrupted and interrupt_at in output:
                interrupted = True
                os.write(terminal, b"\x03")
        else:
            os.kill(pid, 9)
    finally:
        os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert interrupt_at is None or interrupted, f"{interrupt_at!r} did not appear in {output!r}"
    return status, output


def shown_at(columns: int, *arguments: str | Path) -> list[str]:
    """The lines that a successful command shows on a terminal of this width, without colours."""
    status, output = on_terminal(list(map(str, arguments)), columns=columns)
    assert status == 0, output
    return without_codes(output).splitlines()


def without_codes(output: str) -> str:
    """What a terminal shows: without colours, and with the line ends of a file."""
    return _CODES.sub("", output).replace("\r\n", "\n")


def _clean(env: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """Without the settings of whoever runs the tests."""
    ours: dict[str, str | None] = {
        name: None for name in os.environ if name.startswith(("ENGINE_LOADER_", "VLLM_PLUGINS"))
    }
    return {**ours, "COLUMNS": "200", **(env or {})}
