"""Faults of storage, injected below the native reader threads; the scenarios are in scenarios.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .building import compile_shim
from .scenarios import FAULTS_BYTES, SCENARIOS


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_when_reads_fail(name: str, shim: Path, tmp_path: Path) -> None:
    words = tmp_path / "faults"
    words.write_bytes(bytes(FAULTS_BYTES))
    done = subprocess.run(
        [sys.executable, "-m", "tests.transfer.native.scenarios", name, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "LD_PRELOAD": str(shim), "ENGINE_LOADER_FAULTS": str(words)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
