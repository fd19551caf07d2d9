"""What the tests of SGLang share: the versions that they start."""

import os

import pytest

from tests.support.sglang_server import python_of

VERSIONS = os.environ.get("SGLANG_VERSIONS", "0.5.23 0.5.11 0.5.10").split()
NEWEST = VERSIONS[0]


@pytest.fixture(autouse=True, scope="session")
def _environments() -> None:
    missing = [version for version in VERSIONS if not python_of(version).exists()]
    assert not missing, f"SGLang {', '.join(missing)} is not installed: make venv-sglang"
