"""From 3FS to a device under the sanitizers, with the emulator and the stand-in compiled with them too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.sanitizers import run_sanitized
from tests.support.threefs import sanitized_emulator

from .building import HERE, Drivers, Mutant, found_by

pytestmark = [pytest.mark.sanitizers, pytest.mark.slow]
ROUNDS = {"address,undefined": 60, "thread": 24}
_TRIES = 5

MUTANTS = [
    Mutant(
        "a_ring_is_read_into_under_a_copy",
        "",
        "reader_usrbio",
        {"            if (copied == 0) continue;\n": "            (void)copied;\n"},
    ),
    Mutant(
        "a_cancel_does_not_wait_for_copies",
        "",
        "reader_usrbio",
        {"if (work == nullptr || slot.state == Slot::copying) continue;": "if (work == nullptr) continue;"},
    ),
]


@pytest.fixture(params=ROUNDS)
def sanitizers(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(drivers: Drivers, mutant: Mutant | None, scratch: Path, seed: int = 1) -> subprocess.CompletedProcess[str]:
    with pytest.MonkeyPatch.context() as patch:
        emulator = sanitized_emulator(scratch, drivers.sanitizers, patch)
        places = [drivers.standin, emulator.library, emulator.mount, emulator.file]
        command = [drivers.make(mutant), *places, ROUNDS[drivers.sanitizers], seed]
        return run_sanitized([str(part) for part in command], drivers.sanitizers, timeout_s=280)


def drivers_of(sanitizers: str, pytestconfig: pytest.Config, folder: Path) -> Drivers:
    assert pytestconfig.cache is not None
    return Drivers(pytestconfig.cache.mkdir("native"), folder, sanitizers, HERE / "usrbio_driver.cpp")


def test_the_rules_are_kept(sanitizers: str, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    done = run(drivers_of(sanitizers, pytestconfig, tmp_path), None, tmp_path)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr[-5000:]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_rule_that_is_taken_out_is_missed(mutant: Mutant, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    drivers = drivers_of("address,undefined", pytestconfig, tmp_path)
    said = found_by(lambda seed: run(drivers, mutant, tmp_path, seed), _TRIES)
    assert "not so:" in said, said
