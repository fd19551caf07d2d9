"""What all tests of the compile cache have."""

from pathlib import Path

import pytest

from tests.compile_cache.support import Machine


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def first(tmp_path: Path, store: Path) -> Machine:
    """A machine with a cache."""
    machine = Machine(tmp_path / "first", store)
    machine.write("inductor/ab/kernel.so", b"code" * 1000, mtime_ns=1_700_000_000_123_456_789)
    machine.write("inductor/fxgraph/ab/kernel.cpp", b"int main() {}")
    machine.write("inductor/fxgraph/ab/empty", b"")
    machine.write("triton/XYZAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA/kernel.cubin", bytes(range(256)))
    return machine


@pytest.fixture
def second(tmp_path: Path, store: Path) -> Machine:
    """A fresh machine."""
    return Machine(tmp_path / "second", store)
