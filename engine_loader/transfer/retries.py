"""Reads that fail and are tried again: said once, or a storage that dies slowly would look healthy."""

from __future__ import annotations

import errno
import logging

logger = logging.getLogger(__name__)


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
