"""How many reads the process that warms the page cache has on their way: as few as give the disk's bandwidth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EPOCH_S = 0.2
_READS_IN_AN_EPOCH = 2  # for each that may be on its way
_WORTH = 1.3  # times the bandwidth, for twice as many
_HOLD_S = 4.0  # until twice as many are tried again,
_HOLD_EPOCHS = 8  # or so many times what the trial took
_LOOK_S = 0.2


class Pace:
    """Lets so many reads be on their way at once as give the bandwidth of what they read from.

    What anybody else reads from a disk, or through a limit on it, waits behind all that is on its way, whatever the
    priorities; and what answers late gives its bandwidth only to many at once. So twice as many are tried now and then,
    and kept where they bring a third more bytes a second.

    Args:
        most: reads that may be on their way at once, at most.
        window: that may be at first.
        clock: seconds that only grow.
    """

    def __init__(self, most: int, window: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.window = window
        self._most = most
        self._clock = clock
        self._changed = threading.Condition()
        self._under_way = self._done = self._reads = 0
        self._began = self._try_at = clock()
        self._before: float | None = None  # bytes a second with half as many, where this is a trial

    @contextmanager
    def read(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
        """One read is on its way while the block runs, once there is room for it or ``stopped``.

        Yields:
            A list, into which the block puts the number of bytes that came.
        """
        with self._changed:
            while self._under_way >= self.window and not stopped():
                self._changed.wait(_LOOK_S)
            self._under_way += 1
        came: list[int] = []
        try:
            yield came
        finally:
            with self._changed:
                self._under_way -= 1
                self._account(sum(came))
                self._changed.notify_all()

    def _account(self, nbytes: int) -> None:
        self._done += nbytes
        self._reads += 1
        now = self._clock()
        if now - self._began < _EPOCH_S or self._reads < _READS_IN_AN_EPOCH * self.window:
            return
        rate = self._done / (now - self._began)
        if self._before is not None and rate < _WORTH * self._before:
            self.window //= 2
            self._before, self._try_at = None, now + max(_HOLD_S, _HOLD_EPOCHS * (now - self._began))
        elif now >= self._try_at and self.window < self._most:
            self._before = rate
            self.window = min(2 * self.window, self._most)
        self._began, self._done, self._reads = now, 0, 0
