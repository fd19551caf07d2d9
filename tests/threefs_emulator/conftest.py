from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.threefs import Emulator, clean_emulator

from .driving import ContentFile


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with clean_emulator() as running:
        yield running


@pytest.fixture
def file(emulator: Emulator) -> ContentFile:
    content = np.random.default_rng(1).bytes(1 << 20)
    path = emulator.mount / "file"
    path.write_bytes(content)
    return path, content
