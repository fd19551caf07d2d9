"""What all tests of checkpoints of trainings share."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch warns that there is no process group, which is how it is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
