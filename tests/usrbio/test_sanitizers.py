"""The native reader under the sanitizers, with the emulator compiled with them too."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine_loader import threefs_emulator
from engine_loader.transfer.native_library import library_path
from tests.support.sanitizers import sanitizer_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # compiling is most of it
HERE = Path(__file__).parent


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_reader_is_clean(sanitizers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = library_path().parent
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1", "-g", "-pthread"]
    driver = tmp_path / "driver"
    sources = [HERE / "driver.cpp", *sorted(native.glob("*.cpp"))]
    command = ["c++", "-std=c++17", *flags, f"-I{native}", *map(str, sources), "-o", str(driver), "-ldl", "-rdynamic"]
    subprocess.run(command, check=True)
    monkeypatch.setenv("CC", f"cc {' '.join(flags)}")
    library = threefs_emulator.build_emulator(tmp_path / "lib")
    mount = (tmp_path / "mount").resolve()
    mount.mkdir()
    file = mount / "file"
    file.write_bytes(np.random.default_rng(1).bytes(700_001))
    environment = {**sanitizer_environment(), "HF3FS_EMULATOR_MOUNT": str(mount)}
    done = subprocess.run(
        [driver, library, mount, file], check=False, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == "done\n"
