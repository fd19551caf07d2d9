"""Ctrl-C while other packages' code runs."""

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
    """Within, Ctrl-C ends the process with status 130 after two seconds at the latest.

    Some of the loaders that are measured wait on Ctrl-C for threads of theirs that never end.
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
        # The progress bar hid it, and had no time to show it again.
        sys.stderr.write(_SHOW_CURSOR)
        sys.stderr.flush()
    os._exit(_STATUS)
