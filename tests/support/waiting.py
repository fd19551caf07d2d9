"""Waiting in tests: for what must come, on a machine that may stall for seconds at any moment."""

import functools
import time
from collections.abc import Callable
from typing import ParamSpec

GENEROUS_S = 60.0
"""After this nothing comes any more, on however slow a machine."""
LAST_S = 4 * GENEROUS_S
"""The same of a process of the lowest priority (nice 19), which gets little while other tests have all CPUs."""

P = ParamSpec("P")


def wait_for(condition: Callable[[], object], timeout_s: float = GENEROUS_S) -> None:
    """Return when ``condition`` holds; AssertionError when it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.002)


def any_try(tries: int) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A check that may be made ``tries`` times, and has to pass once.

    For what a short deadline of the code under test makes a race with the machine, and cannot be made otherwise: a
    machine that stalls for longer than the deadline spoils a try or two, what is broken fails in all of them.
    """

    def decorate(check: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(check)
        def repeated(*args: P.args, **kwargs: P.kwargs) -> None:
            for left in reversed(range(tries)):
                try:
                    return check(*args, **kwargs)
                except Exception:
                    if left == 0:
                        raise

        return repeated

    return decorate
