"""A server of a tiny model, what it answers, and the parameters that each of its ranks has loaded."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.sglang_server import PROBE, SglangServer, patched, python_of

PROMPT = "the quick brown fox"
FORMAT = ("--load-format", "b10_3fs")


@dataclass
class Served:
    """What a server answered, and by rank the digests of its parameters as it had loaded them."""

    text: str
    log: str
    parameters: dict[str, dict[str, str]]


@contextmanager
def running(version: str, model: str | Path, probe: Path, *args: str, env: dict[str, str]) -> Iterator[SglangServer]:
    probe.mkdir(parents=True, exist_ok=True)
    env = {"SGLANG_PROBE": str(probe), "PYTHONPATH": str(PROBE), **env}
    with patched(version), SglangServer(version, model, *args, env=env) as server:
        yield server


def served(version: str, model: Path, probe: Path, *args: str, **env: str) -> Served:
    with running(version, model, probe, *args, env=env) as server:
        text = server.complete(PROMPT, max_tokens=24)
    return Served(text, server.log, digests(probe))


def digests(probe: Path) -> dict[str, dict[str, str]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(probe.glob("rank-*.json"))}


def loaded_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.search(r"b10_3fs: (rank \d+ of \d+: )?loaded", line)]


def said(version: str, program: str, *args: str | Path) -> Any:
    """What one of the programs that the tests have for SGLang's environment prints."""
    command = [str(python_of(version)), str(PROBE.parent / program), *map(str, args)]
    given = {name: value for name, value in {**os.environ, **SglangServer.ENVIRONMENT}.items() if value is not None}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    start = Path(program).stem.upper() + " "
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(start)]
    return json.loads(line.removeprefix(start))
