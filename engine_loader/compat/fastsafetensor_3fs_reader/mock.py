"""The reader of ordinary files, for programs that run where there is no 3FS."""

from __future__ import annotations

from typing import Any

from ...sources.posix import PosixSource
from ..address_reader import AddressReader
from .backends import settings_for
from .interface import FileReaderInterface

__all__ = ["MockFileReader"]


class MockFileReader(AddressReader, FileReaderInterface):
    """Reads ordinary files through the kernel: nothing of 3FS is needed.

    Args:
        mount_point: kept, and not looked at.
        _: what other readers take.
    """

    def __init__(self, mount_point: str = "", **_: Any) -> None:
        super().__init__(PosixSource(), settings_for("auto"))
        self.mount_point = mount_point
