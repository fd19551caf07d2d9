"""The stand-in for the CUDA runtime, checked after every test: no rule broken, nothing left."""

from collections.abc import Iterator

import pytest

from tests.transfer.native.building import ensure_library

from .building import compile_standin
from .standin_devices import StandIn


@pytest.fixture(scope="session")
def loaded_standin(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    ensure_library()
    return StandIn(compile_standin(tmp_path_factory.mktemp("standin")))


@pytest.fixture
def standin(loaded_standin: StandIn) -> Iterator[StandIn]:
    loaded_standin.reset()
    yield loaded_standin
    loaded_standin.hold_stream(False)
    loaded_standin.hold_copies(False)
    assert loaded_standin.violations() == (0, "")
    assert {name: count for name, count in loaded_standin.live().items() if name != "allocations"} == {
        "pinned": 0,
        "streams": 0,
        "events": 0,
    }
