"""Calls on a mount block for as long as 3FS's daemon does not answer, so threads that can be left behind make them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class NoAnswer(Exception):
    """A call did not return in time; its thread goes on waiting for it."""


class _Call:
    """A call, and what came of it."""

    def __init__(self, call: Callable[[], Any], dispose: Callable[[Any], object] | None) -> None:
        self._call, self._dispose = call, dispose
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        self._given_up = False

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # raised where the result is waited for
            self._error = error
        with self._lock:
            late = self._given_up
            self._done.set()
        if late and self._error is None and self._dispose is not None:
            result, self._result = self._result, None
            self._dispose(result)

    def wait(self, timeout_s: float, progress: Callable[[], float]) -> Any:
        try:
            while not self._done.wait(max(0.0, progress() + timeout_s - time.monotonic())):
                if progress() + timeout_s <= time.monotonic() and self._give_up():
                    raise NoAnswer
        except BaseException:
            self._give_up()
            raise
        if self._error is not None:
            raise self._error
        return self._result

    def _give_up(self) -> bool:
        """True if the call has not returned: what it returns later is disposed of."""
        with self._lock:
            self._given_up = not self._done.is_set()
            return self._given_up


class WatchedThread:
    """A thread that makes calls one at a time. After ``NoAnswer`` it must not be used again, only ended.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, call: Callable[[], T], timeout_s: float, progress: Callable[[], float] | None = None) -> T:
        """What ``call`` returns.

        Args:
            call: made on the thread.
            timeout_s: how long to wait for it.
            progress: when the call last came on, in seconds of time.monotonic(): it has ``timeout_s`` from then.

        Raises:
            NoAnswer: it did not return in time.
        """
        made = _Call(call, None)
        self._calls.put(made)
        began = time.monotonic()
        result: T = made.wait(timeout_s, progress or (lambda: began))
        return result

    def end(self, last: Callable[[], object], timeout_s: float) -> None:
        """Make a last call and end, when the call before it returns; waits for up to ``timeout_s``."""
        self._calls.put(_Call(last, None))
        self._calls.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()


def call_within(timeout_s: float, call: Callable[[], T], dispose: Callable[[T], object] | None = None) -> T:
    """What ``call`` returns, made on a thread of its own.

    Args:
        timeout_s: how long to wait for it.
        call: what to call.
        dispose: gets a result that comes when nobody waits for it any more.

    Raises:
        NoAnswer: it did not return in time.
    """
    made = _Call(call, dispose)
    began = time.monotonic()
    thread = threading.Thread(target=made.run, name="engine-loader-3fs-call", daemon=True)
    thread.start()
    result: T = made.wait(timeout_s, lambda: began)
    thread.join()
    return result
