"""The time of a store's own clock. Machines of a fleet disagree about the time; ages in a store are counted by the
times that the store itself gives to what is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

_TRUSTED_S = 600.0
"""A measurement counts for so long."""


class StoreClock:
    """Args:
    measure: writes something, and returns the time that the store gave it; OSError where it cannot be written.
    """

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure = measure
        self._offset: float | None = None
        self._measured = 0.0
        self._newest = 0.0

    def wrote(self, modified: float) -> None:
        """Something that was written just now has the time ``modified``."""
        self._measured = time.monotonic()
        self._offset = modified - self._measured

    def listed(self, modified: float) -> None:
        """An object has the time ``modified``: it is not earlier now."""
        self._newest = max(self._newest, modified)

    def now(self) -> float:
        """Seconds since the epoch. Where nothing can be written, the newest time in a listing, and this machine's
        clock where there is none.
        """
        if self._offset is None or time.monotonic() - self._measured > _TRUSTED_S:
            with suppress(OSError):
                self.wrote(self._measure())
        return self.known()

    def known(self) -> float:
        """The time as far as it is known without writing anything."""
        if self._offset is not None:
            return time.monotonic() + self._offset
        return self._newest or time.time()
