"""The C++ code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; see driver.cpp."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.sanitizers import sanitizer_environment

from .building import compile_driver


@pytest.mark.parametrize(("sanitizers", "rounds"), [("address,undefined", 200), ("thread", 60)])
def test_random_plans_are_clean(sanitizers: str, rounds: int, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    driver = compile_driver(pytestconfig.cache.mkdir("native"), sanitizers)
    command = [str(driver), str(tmp_path), str(rounds), "1"]
    if sanitizers == "thread":
        # ThreadSanitizer has fixed ideas of the address space; newer kernels' randomization does not keep to them.
        command = ["setarch", "--addr-no-randomize", *command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=sanitizer_environment()
    )
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr
