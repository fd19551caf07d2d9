"""Signs of a storage that dies slowly: reads that are tried again, a file that takes much longer than others."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable

logger = logging.getLogger(__name__)

_MUCH_SLOWER = 4.0
_FEWEST_FILES = 3
_TIMED_BYTES = 4 << 20
"""Of fewer, the time says little."""


class RetryLog:
    """Warns of the first read that is tried again.

    Attributes:
        first: which read that was and why, for the line at the end of a load; "" as long as there is none.
    """

    def __init__(self) -> None:
        self.first = ""

    def note(self, path: str, offset: int, code: int | None) -> None:
        """A read at ``offset`` of a file failed with an errno, and is tried again; EINTR is no sign of trouble."""
        if self.first or code == errno.EINTR:
            return
        name = errno.errorcode.get(code or 0, "an error")
        self.first = f"{path} ({name})"
        logger.warning("%s: a read at byte %d failed with %s and is tried again; others may follow", path, offset, name)


class FileTimes:
    """How long the reads of each file took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, int] = {}

    def add(self, path: str, seconds: float, nbytes: int) -> None:
        """Count reads of a file: seconds, summed over them, and bytes."""
        with self._lock:
            self._seconds[path] = self._seconds.get(path, 0.0) + seconds
            self._bytes[path] = self._bytes.get(path, 0) + nbytes

    def slowest(self) -> str:
        """The file that took the longest for its bytes, and how many times as long as the median of all; "" where no
        file stands out."""
        with self._lock:
            paces = {
                path: self._seconds[path] / nbytes for path, nbytes in self._bytes.items() if nbytes >= _TIMED_BYTES
            }
        if len(paces) < _FEWEST_FILES:
            return ""
        path = max(paces, key=lambda path: paces[path])
        ratio = paces[path] / max(_median(paces.values()), 1e-15)
        return f"{path} ({ratio:.1f} times the median)" if ratio >= _MUCH_SLOWER else ""


def _median(values: Iterable[float]) -> float:
    """Without the module statistics: every start would import it, with decimals and fractions."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
