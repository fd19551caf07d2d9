"""The ways in which a checkpoint of real files can be read."""

import pytest

from engine_loader.errors import TransferError
from engine_loader.transfer.native.library import load_library

WAYS: dict[str, dict[str, object]] = {
    "python": {"engine": "python"},
    "buffered": {"engine": "cpp", "read_mode": "buffered"},
    "direct": {"engine": "cpp", "read_mode": "direct"},
    "mapped": {"engine": "cpp", "read_mode": "mapped"},
}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> dict[str, object]:
    """Options of open_checkpoint for one way of reading."""
    options = WAYS[request.param]
    if options["engine"] == "cpp":
        try:
            load_library()
        except TransferError as error:
            pytest.skip(f"no native library: {error}")
    return options
