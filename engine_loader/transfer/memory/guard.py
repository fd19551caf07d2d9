"""Mapped memory whose file may be cut short: see native/guard.h."""

from __future__ import annotations

import ctypes
import os
from functools import cache

from ..native.library import load_library


class Guard:
    """While it stands, touching a page behind the end of a mapped file gives zeros, and trips the guard, instead of
    ending the process.

    Args:
        address: of the mapping.
        nbytes: of the mapping.

    Raises:
        MemoryError: too many mappings are guarded at once.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self._library = _library()
        self._number: int = self._library.el_guard_add(address, nbytes)
        self._was_tripped = False
        if self._number < 0:
            raise MemoryError("too many mapped ranges are guarded at once")

    @property
    def tripped(self) -> bool:
        """Whether a page had to be replaced."""
        if self._number >= 0 and self._library.el_guard_tripped(self._number):
            self._was_tripped = True
        return self._was_tripped

    def remove(self) -> None:
        """End the guard, before the memory is unmapped. Safe to call twice."""
        number, self._number = self._number, -1
        if number >= 0 and self._library.el_guard_remove(number):
            self._was_tripped = True


def detach(address: int, nbytes: int) -> None:
    """Replace mapped pages by memory of this process's own with the same content, so that they no longer depend on
    their file.

    Raises:
        OSError: there is not enough memory.
    """
    error = _library().el_detach(address, nbytes)
    if error:
        raise OSError(error, os.strerror(error))


@cache
def _library() -> ctypes.CDLL:
    library = load_library()
    for name, result, arguments in (
        ("el_guard_add", ctypes.c_int32, [ctypes.c_uint64, ctypes.c_uint64]),
        ("el_guard_tripped", ctypes.c_int, [ctypes.c_int32]),
        ("el_guard_remove", ctypes.c_int, [ctypes.c_int32]),
        ("el_detach", ctypes.c_int, [ctypes.c_uint64, ctypes.c_uint64]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
