from collections.abc import Iterator

import pytest

from tests.support.threefs import Emulator, clean_emulator


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with clean_emulator() as running:
        yield running
