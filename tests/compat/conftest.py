from collections.abc import Iterator

import pytest

from tests.support.threefs import Emulator, machine_with_3fs


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The emulator as the 3FS of this machine."""
    with machine_with_3fs(monkeypatch) as running:
        yield running
