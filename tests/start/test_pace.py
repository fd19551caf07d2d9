"""How many reads are on their way at once: as few as give the bandwidth."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from engine_loader.start.pace import Pace

MIB = 1 << 20


class Simulated:
    """Reads of 1 MiB on a clock of their own, always as many as may be on their way."""

    def __init__(self, seconds: Callable[[int], float], most: int = 32) -> None:
        self.now = 0.0
        self.pace = Pace(most, clock=lambda: self.now)
        self.seconds = seconds  # from the end of one read to that of the next, with so many on their way
        self._under_way: deque[AbstractContextManager[list[int]]] = deque()

    def windows(self, duration: float) -> list[int]:
        """How many might be on their way, at the end of each read within that time."""
        found = []
        until = self.now + duration
        while self.now < until:
            while len(self._under_way) < self.pace.window:
                reading = self.pace.read()
                self._came = reading.__enter__()
                self._under_way.append(reading)
                self._came.append(MIB)
            self.now += self.seconds(len(self._under_way))
            self._under_way.popleft().__exit__(None, None, None)
            found.append(self.pace.window)
        return found


def a_limit(bytes_per_s: float) -> Callable[[int], float]:
    return lambda under_way: MIB / bytes_per_s


def a_latency(seconds: float) -> Callable[[int], float]:
    return lambda under_way: seconds / under_way


@pytest.mark.parametrize("bytes_per_s", [2e6, 50e6, 200e6, 2e9])
def test_of_what_has_a_limit_one_read_at_a_time_but_for_trials(bytes_per_s: float) -> None:
    windows = Simulated(a_limit(bytes_per_s)).windows(30)
    assert set(windows) == {1, 2}
    assert windows.count(1) > 0.75 * len(windows)


@pytest.mark.parametrize("seconds", [0.005, 0.05, 0.5])
def test_of_what_answers_late_many_at_once(seconds: float) -> None:
    simulated = Simulated(a_latency(seconds))
    simulated.windows(60)
    assert simulated.windows(5)[-1] == 32


def test_no_more_than_bring_bandwidth() -> None:
    """10 ms each, and 400 MB/s for all: four at once give that."""
    simulated = Simulated(lambda under_way: max(0.01 / under_way, MIB / 400e6))
    simulated.windows(20)
    windows = simulated.windows(20)
    assert set(windows) == {4, 8}
    assert windows.count(4) > 0.75 * len(windows)


def test_no_more_are_on_their_way_than_may_be_whoever_reads() -> None:
    pace, lock = Pace(4), threading.Lock()
    at_once: list[int] = []
    under_way = [0]

    def work() -> None:
        for _ in range(40):
            with pace.read() as came:
                with lock:
                    under_way[0] += 1
                    at_once.append(under_way[0])
                time.sleep(0.001)
                came.append(MIB)
                with lock:
                    under_way[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(at_once) == 16 * 40
    assert max(at_once) <= 4


def test_who_waits_goes_on_when_it_is_over() -> None:
    pace, over = Pace(1), threading.Event()
    with pace.read():
        waiting = threading.Thread(target=lambda: pace.read(over.is_set).__enter__())
        waiting.start()
        over.set()
        waiting.join(30)
        assert not waiting.is_alive()


def test_a_read_that_fails_is_over() -> None:
    pace = Pace(1)
    with pytest.raises(OSError, match="gone"), pace.read():
        raise OSError("gone")
    with pace.read():
        pass
