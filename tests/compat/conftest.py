from collections.abc import Iterator

import pytest

from tests.support.threefs import Emulator, clean_emulator


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The emulator as the 3FS of this machine."""
    with clean_emulator() as running:
        monkeypatch.setenv("HF3FS_LIB_DIR", running.lib_dir)
        monkeypatch.setenv("HF3FS_EMULATOR_MOUNT", str(running.mount))
        monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
        yield running
