"""Names what a start hangs at, while it hangs: one thread that sleeps, and looks at what has begun and not ended.

Each cause is told once. What it costs is a look at a few numbers every few seconds. It asks no file system that weights
are on: a mount that hangs would take this thread with it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import EngineLoaderError
from ..machine import mounts
from . import phases
from .events import LOCK, PLACE, PROGRESS, Details, Recorder
from .stalls import Stall

_LOOKS_PER_STALL = 4
_SLOWEST_LOOK_S = 5.0
_PATIENCE = {
    phases.HEADERS: 1,
    phases.WEIGHT_READING: 1,
    phases.RESTORE_WAIT: 1,
    phases.RESTORE: 1,
    phases.COMPILE: 6,
    phases.WARM_UP: 6,
    phases.GRAPH_CAPTURE: 6,
    phases.AFTER_WEIGHTS: 6,
}
"""Phase -> how many times ``stall_s`` it may take; without a byte, where it counts bytes."""
_USUAL_PATIENCE = 3
_HINTS = {
    phases.CONFIGURATION: "; is a model hub out of reach? (HF_HUB_OFFLINE=1 for models on disk)",
    phases.DEVICE: "; do all ranks run, and reach each other?",
    phases.COMPILE: "; a restored compile cache saves it in later starts",
}


class Watchdog:
    """Looks after the phases of this process; where they wait for other processes, after those.

    Args:
        recorder: has the phases.
        stall_s: seconds without progress that count as a stall.
        tell: called with each message.
        clock: the monotonic clock.
    """

    def __init__(
        self,
        recorder: Recorder,
        stall_s: float,
        tell: Callable[[str], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recorder = recorder
        self._stall_s = stall_s
        self._tell = tell
        self._clock = clock
        self._told: set[str] = set()
        self._progress: dict[int, tuple[int, float]] = {}  # phase -> bytes done, and since when
        self._ended = threading.Event()

    def start(self) -> None:
        """Look every few seconds, in a thread that ends with the process, or when the engine is ready."""
        threading.Thread(target=self._run, name="start-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()

    def check(self) -> None:
        """Look once; tells what has not been told."""
        for stall in self._stalls():
            if stall.cause not in self._told:
                self._told.add(stall.cause)
                self._recorder.point(phases.STALL, text=stall.text)
                self._tell(stall.text)

    def _run(self) -> None:
        while not self._ended.wait(min(_SLOWEST_LOOK_S, self._stall_s / _LOOKS_PER_STALL)):
            try:
                self.check()
            except (OSError, ValueError, KeyError, EngineLoaderError):  # files that other processes write and remove
                continue

    def _stalls(self) -> Iterator[Stall]:
        now = self._clock()
        innermost: dict[int, int] = {}
        for number, (_, _, thread, _) in sorted(self._recorder.open.items()):
            innermost[thread] = number
        for number in innermost.values():
            phase, began, thread, details = self._recorder.open.get(number, ("", now, 0, {}))
            # Since something last ended in this thread, it has gone on.
            began = max(began, self._recorder.last_ends.get(thread, began))
            if phase in (phases.ENGINE_PROCESS, phases.WORKER_PROCESSES, phases.WORKERS_AT_WORK):
                yield from self._of_ranks()
            elif PROGRESS in details:
                yield from self._of_bytes(number, details, now)
            elif phase and now - began >= self._stall_s * _PATIENCE.get(phase, _USUAL_PATIENCE):
                yield Stall(phase, _said_of(phase, now - began, details))

    def _of_bytes(self, number: int, details: Details, now: float) -> Iterator[Stall]:
        from .load_report import human_bytes

        done, whole, waits_for = details[PROGRESS]()
        before, since = self._progress.get(number, (-1, now))
        if done != before:
            self._progress[number] = (done, now)
        elif now - since >= self._stall_s and done < whole:
            counts = f"{human_bytes(done)} of {human_bytes(whole)} are there"
            if waits_for == "source":
                text = f"no byte of the weights for {now - since:.0f} s from {_place(details)}: {counts}"
                yield Stall(phases.WEIGHT_READING, f"{text}{_blocked_threads()}")
            else:
                text = (
                    f"the engine has taken no weights for {now - since:.0f} s, and the source is not what it waits for"
                )
                yield Stall(f"{phases.WEIGHT_READING}: engine", f"{text}: {counts}")

    def _of_ranks(self) -> Iterator[Stall]:
        from .reading.timeline import read_timeline
        from .slow_ranks import slow_ranks

        directory = self._recorder.directory
        if directory is not None:
            timeline = read_timeline(Path(directory))
            yield from slow_ranks(timeline, time.time() - timeline.began_wall, self._stall_s)


def _said_of(phase: str, seconds: float, details: Details) -> str:
    if phase == phases.HEADERS:
        return f"opening the weights at {_place(details)} has taken {seconds:.0f} s so far{_blocked_threads()}"
    if phase == phases.RESTORE_WAIT:
        holder = _holder(details.get(LOCK))
        return f"waiting for {seconds:.0f} s for the compile cache's restore{holder}"
    if phase == phases.RESTORE:
        return f"the compile cache's restore from {_place(details)} has taken {seconds:.0f} s so far"
    return f"{phase} has taken {seconds:.0f} s so far{_HINTS.get(phase, '')}{_blocked_threads()}"


def _place(details: Details) -> str:
    place = str(details.get(PLACE) or "the source")
    kind = _file_system_of(place)
    return f"{place} ({kind})" if kind else place


def _file_system_of(path: str) -> str:
    """The type of the file system at an absolute path, by its text alone; "" where there is none."""
    if not path.startswith("/"):
        return ""
    holding = [mount for mount in mounts() if path == mount.point or path.startswith(f"{mount.point.rstrip('/')}/")]
    return max(holding, key=lambda mount: len(mount.point)).kind if holding else ""


def _blocked_threads(task: Path = Path("/proc/self/task")) -> str:
    """How many threads of this process the kernel holds (state D), in words."""
    blocked = 0
    for thread in task.iterdir():
        try:
            blocked += (thread / "stat").read_text().rpartition(")")[2].split()[0] == "D"
        except (OSError, IndexError):
            continue
    return f"; {blocked} thread{'s' if blocked > 1 else ''} in D state: the kernel waits" if blocked else ""


def _holder(lock: object) -> str:
    """Who holds an flock, in words."""
    if not lock:
        return ""
    try:
        inode = os.stat(str(lock)).st_ino
        table = Path("/proc/locks").read_text()
    except OSError:
        return ""
    pids = re.findall(rf"^\d+: FLOCK +\w+ +\w+ +(\d+) [0-9a-f]+:[0-9a-f]+:{inode} ", table, re.MULTILINE)
    others = sorted({pid for pid in pids if pid not in ("0", str(os.getpid()))})
    return f", whose lock pid {', '.join(others)} holds" if others else ""
