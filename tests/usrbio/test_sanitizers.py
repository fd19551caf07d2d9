"""The native reader under the sanitizers, with the emulator compiled with them too."""

from pathlib import Path

import numpy as np
import pytest

from engine_loader import threefs_emulator
from tests.native.building import compile_driver, engine_objects, link
from tests.support.sanitizers import run_sanitized

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # compiling is most of it
HERE = Path(__file__).parent


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_reader_is_clean(
    sanitizers: str, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("native")
    driver = tmp_path / "driver"
    objects = [compile_driver(kept, sanitizers, HERE / "driver.cpp"), *engine_objects(kept, sanitizers).values()]
    link(objects, driver, sanitizers, "-rdynamic")
    monkeypatch.setenv("CC", f"cc -fsanitize={sanitizers} -fno-sanitize-recover=all -O1 -g -pthread")
    library = threefs_emulator.build_emulator(tmp_path / "lib")
    mount = (tmp_path / "mount").resolve()
    mount.mkdir()
    file = mount / "file"
    file.write_bytes(np.random.default_rng(1).bytes(700_001))
    monkeypatch.setenv("HF3FS_EMULATOR_MOUNT", str(mount))
    done = run_sanitized([str(driver), str(library), str(mount), str(file)], sanitizers)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == "done\n"
