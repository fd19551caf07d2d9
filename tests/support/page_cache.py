"""What of a file lies in the page cache, and files that do not."""

import os
from pathlib import Path

import pytest

from engine_loader.transfer.modes import resident_share


def share_of(path: Path) -> float:
    """The part of a file that lies in the page cache."""
    with path.open("rb") as file:
        return resident_share(file.fileno(), path.stat().st_size) or 0.0


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def made_cold(*paths: Path) -> None:
    """Take files out of the page cache; the test is skipped where that cannot be."""
    for path in paths:
        drop(path)
    if any(map(share_of, paths)):
        pytest.skip("the temporary directory is on a file system whose pages cannot be dropped")
