"""A process that ends while reads are in flight ends as it was told to: it does not abort, crash or hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_loader.sources.threefs.links import remove_dead
from tests.support.checkpoints import noise
from tests.support.threefs import clean_emulator

ROUNDS = 30 if "EXTENDED_TESTS" in os.environ else 1


@pytest.mark.parametrize("kind", ["native", "python", "usrbio native", "usrbio python"])
def test_reads_in_flight_do_not_change_how_a_process_ends(kind: str, tmp_path: Path) -> None:
    with clean_emulator() as emulator:
        path = (emulator.mount if kind.startswith("usrbio") else tmp_path) / "file"
        path.write_bytes(noise(1 << 20, 4))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tests.transfer.exits", kind, str(path), str(ROUNDS)],
                capture_output=True,
                text=True,
                cwd=Path(__file__).parent.parent.parent,
                env={**os.environ, **emulator.environment("latency_us=3000", whole_mount=True)},
                check=False,
            )
        finally:
            emulator.sweep()  # as the daemon does for those that ended at once; and the next start:
            remove_dead()
            path.unlink()
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
