"""The process that reads weights into memory while an engine imports, and hands them to the loaders.

It imports neither torch nor the engine. It gets what to read on its standard input, and says what it did as one line of
JSON when it reads no more. It keeps the memory until the loaders that took it have closed theirs, until nobody has come
for it in a while, or until its input ends (the process that started it is gone).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import EngineLoaderError
from ..machine import has_accelerator
from ..settings import LoaderSettings
from ..sources.registry import make_source
from ..start.page_reading import Budget, Ranges
from ..start.page_warmer import LOADER_BEGAN, at_end_of, be_a_helper, is_one_of_us, listen, read_order
from .handing_over import hand_over, server_of
from .stock_filling import Filling

GRACE_S = 30.0
"""After the last loader has gone: other ranks may come later."""
IDLE_S = 900.0
"""After the last read, where no loader comes: an engine that begins to load later than that reads all by itself."""
_LOOK_S = 1.0


class Keeper:
    """Fills a stock, and hands it to whoever begins to load.

    Args:
        filling: the stock.
        listening: where loaders come, see ``listen``.
        lifeline: a descriptor that is at its end when the process that asked is gone; None: there is none.
        tell: called with the account when no more is read.
    """

    def __init__(
        self,
        filling: Filling,
        listening: socket.socket,
        lifeline: int | None,
        tell: Callable[[Mapping[str, object]], object],
    ) -> None:
        self._filling = filling
        self._listening = listening
        self._lifeline = lifeline
        self._tell = tell
        self._ended = threading.Event()
        self._told = False
        self._loaders: dict[int, socket.socket] = {}
        self._end_at: float | None = None

    def serve(self) -> None:
        """Returns when the memory is of no more use."""
        done = at_end_of(self._filling.readers, lambda: self._filling.run(self._ended.is_set))
        try:
            self._serve(done)
        finally:
            os.close(done)

    def _serve(self, done: int) -> None:
        poll = select.poll()
        for descriptor in {done, self._listening.fileno(), *([] if self._lifeline is None else [self._lifeline])}:
            poll.register(descriptor, select.POLLIN)
        while self._end_at is None or self._loaders or time.monotonic() < self._end_at:
            for descriptor, _ in poll.poll(_LOOK_S * 1000):
                if descriptor == done:
                    poll.unregister(done)
                    self._filling.end_reading()
                    self._reads_no_more()
                elif descriptor == self._listening.fileno():
                    self._serve_loader(poll)
                elif descriptor in self._loaders:
                    poll.unregister(descriptor)
                    self._loaders.pop(descriptor).close()
                    self._end_at = time.monotonic() + GRACE_S
                elif not os.read(descriptor, 1):
                    self._ended.set()
                    return

    def _reads_no_more(self) -> None:
        if not self._told:
            self._told = True
            self._tell({"read": self._filling.read, "reason": self._filling.reason})
            self._end_at = time.monotonic() + IDLE_S

    def _serve_loader(self, poll: select.poll) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return
        if not is_one_of_us(connection):
            connection.close()
            return
        self._ended.set()
        self._filling.reason = self._filling.reason or LOADER_BEGAN
        self._reads_no_more()
        try:
            hand_over(connection, self._filling.descriptor, self._filling.parts())
        except OSError:  # it went away
            connection.close()
            self._end_at = time.monotonic() + GRACE_S
            return
        self._loaders[connection.fileno()] = connection
        poll.register(connection, select.POLLIN)


def keep_once(asked: Mapping[str, Any], lifeline: int | None, tell: Callable[[Mapping[str, object]], object]) -> None:
    """Read what was asked for into memory as far as there is room, unless another process does, and hand it over.

    Args:
        asked: ``paths`` and ``ranges`` as ``Filling`` takes them, ``settings`` (the loader's) and ``most_bytes``.
        lifeline: see ``Keeper``.
        tell: see ``Keeper``.
    """
    settings = LoaderSettings(**asked["settings"])
    try:
        listening = listen(asked["paths"][0], server_of(asked["paths"][0], settings))
    except OSError as error:
        tell({"reason": f"their directory cannot be read ({error.strerror})"})
        return
    if listening is None:
        tell({"reason": "another process does it already"})
        return
    with listening:
        budget = Budget(freed=False, for_weights=memory_for_weights(asked["paths"], asked["ranges"], settings))
        filling = Filling(asked["paths"], asked["ranges"], settings, asked["most_bytes"], budget)
        try:
            Keeper(filling, listening, lifeline, tell).serve()
        finally:
            filling.end_reading()  # 3FS's buffers and rings outlive a process


def memory_for_weights(paths: Sequence[str], ranges: Mapping[str, Ranges], settings: LoaderSettings) -> int:
    """How many bytes of this machine's memory the weights will take, in parameters; 0 where they go to accelerators."""
    if has_accelerator():
        return 0
    source = make_source(settings.backend, settings=settings)
    found = 0
    for path in paths:
        with suppress(EngineLoaderError):  # whoever reads it says so
            file = source.open(path)
            found += sum(length for _, length in ranges.get(path, [(0, file.size)]))
            file.close()
    return found


def main() -> None:
    """What the process does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    be_a_helper(signal.SIGTERM)
    with suppress(SystemExit):
        keep_once(read_order(), 0, _say)
    os._exit(0)  # a thread may be in a read that hangs


def _say(account: Mapping[str, object]) -> None:
    os.write(1, json.dumps(account).encode() + b"\n")
