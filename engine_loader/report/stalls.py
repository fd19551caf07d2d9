"""What hangs, as the watchdog tells it."""

from __future__ import annotations

from typing import NamedTuple


class Stall(NamedTuple):
    """Something that hangs; ``cause`` is the same for each message about it."""

    cause: str
    text: str
