"""The native reader under the sanitizers, with the emulator compiled with them too."""

from pathlib import Path

import pytest

from tests.support.sanitizers import run_sanitized
from tests.support.threefs import sanitized_emulator
from tests.transfer.native.building import compile_driver, link, native_objects

pytestmark = [pytest.mark.sanitizers, pytest.mark.slow, pytest.mark.timeout(900)]  # compiling is most of it
HERE = Path(__file__).parent


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_reader_is_clean(
    sanitizers: str, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("native")
    driver = tmp_path / "driver"
    objects = [compile_driver(kept, sanitizers, HERE / "driver.cpp"), *native_objects(kept, sanitizers).values()]
    link(objects, driver, sanitizers, "-rdynamic")
    emulator = sanitized_emulator(tmp_path, sanitizers, monkeypatch)
    done = run_sanitized([str(part) for part in (driver, emulator.library, emulator.mount, emulator.file)], sanitizers)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == "done\n"
