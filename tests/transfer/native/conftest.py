"""The native tests' library, files and destinations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engine_loader.sources.posix import PosixFile, PosixSource
from engine_loader.transfer.native.native_readers import NativeReaders

from .building import ensure_library


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    ensure_library()


@pytest.fixture
def make_file(tmp_path: Path) -> Iterator[Callable[[int], PosixFile]]:
    """Makes an open file of so many random bytes."""
    opened: list[PosixFile] = []

    def make(nbytes: int) -> PosixFile:
        path = tmp_path / f"file{len(opened)}"
        content = np.random.default_rng(len(opened)).bytes(nbytes)
        path.write_bytes(content)
        with open(path, "rb") as written:
            os.fsync(written.fileno())
        opened.append(PosixSource().open(str(path)))
        return opened[-1]

    yield make
    for file in opened:
        file.close()


@pytest.fixture
def readers() -> Iterator[NativeReaders]:
    readers = NativeReaders(2, block_bytes=64 << 10, retry_delay_s=0.001)
    yield readers
    readers.close()
