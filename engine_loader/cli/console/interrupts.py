"""Ends a command on Ctrl-C while code of other packages runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STATUS = 130
_GRACE_S = 2.0
_SHOW_CURSOR = "\x1b[?25h\n"


@contextmanager
def prompt_interrupt() -> Iterator[None]:
    """Make Ctrl-C end the process with status 130 after at most two seconds, while the block runs.

    Some of the measured loaders wait, on Ctrl-C, for threads that never end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    watchdog = threading.Timer(_GRACE_S, _leave)
    watchdog.daemon = True
    watchdog.start()
    raise KeyboardInterrupt


def _leave() -> None:
    if sys.stderr.isatty():
        # The progress bar hid the cursor.
        sys.stderr.write(_SHOW_CURSOR)
        sys.stderr.flush()
    os._exit(_STATUS)
