"""What the processes of an engine write down while they start: phases, with the times at which each began and ended.

Every process appends lines of JSON to a file of its own in the directory of the start (starts.py), whose path child
processes find in the environment. A process in which no start has begun keeps its first events in memory: the plugin is
called long before an engine's configuration tells that this is a start.

Nothing here raises, and nothing waits: the first error ends the writing of a process. Only the standard library is
imported, for the plugin imports this.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .phases import IMPORTS

logger = logging.getLogger(__name__)

VERSION = 1
START = "_ENGINE_LOADER_START"
"""Environment variable for child processes: the directory of the start; ``off`` where nothing is to be written.

Not a setting: those begin with ENGINE_LOADER_.
"""
OFF = "off"
PLACE, PROGRESS, LOCK = "_place", "_progress", "_lock"
"""Details for the watchdog, which are not written: where bytes come from, a function that returns (bytes done, bytes in
all, LoadReport.waits_for), and the path of a lock that is waited for.
"""
MOST_BYTES = 512 << 10
"""Of the events of one process; what comes later is left out."""
_MOST_WAITING = 500

Details = dict[str, Any]


class Recorder:
    """The events of this process, and of processes that are forked from it, each in a file of its own.

    Attributes:
        rank: of this process in its engine, once it is known.
        role: what this process is, once it is known.
        open: the phases that have begun and not ended, by their numbers: (phase, seconds of the monotonic clock,
            native id of the thread, details). Details may change while the phase goes on.
        last_ends: native id of a thread -> when a phase last ended in it, in seconds of the monotonic clock.
    """

    def __init__(self) -> None:
        self.rank: int | None = None
        self.role = ""
        self.open: dict[int, tuple[str, float, int, Details]] = {}
        self.last_ends: dict[int, float] = {}
        self.ready = False
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._waiting: list[Details] = []
        self._keeps = False
        self._directory: str | None = None
        self._descriptor = -1
        self._forked = False
        self._registered: float | None = None
        self._written = 0
        os.register_at_fork(after_in_child=self._after_fork)

    @property
    def directory(self) -> str | None:
        """That of the start; None where nothing is written."""
        return self._directory

    @property
    def knows_process(self) -> bool:
        """Whether this process has been noted."""
        return self._keeps and not self._forked

    def note_process(self, role: str = "") -> None:
        """Note this process, when it began, and what it is; what has been recorded before is kept."""
        self._enter_process()
        if not self._keeps and os.environ.get(START) != OFF:
            self._keeps = True
            directory = os.environ.get(START, "")
            self._directory = directory if os.path.isdir(directory) else None
            began = process_began()
            self.role = role or process_name()
            self._put({"event": "process", "began": began, "ppid": os.getppid(), "role": self.role})
        elif role:
            self.name_process(role)

    def name_process(self, role: str, rank: int | None = None) -> None:
        """Say what this process is, where that turns out later."""
        self.rank, self.role = self.rank if rank is None else rank, role
        self._put({"event": "role", "role": role})

    def write_to(self, directory: str) -> None:
        """From now on this process and its children write to ``directory``, also what they have recorded before."""
        with self._lock:
            self._close()
            self._keeps, self.ready, self._directory = True, False, directory
            os.environ[START] = directory
            waiting, self._waiting = self._waiting, []
            for fields in waiting:
                self._write(fields)

    def switch_off(self) -> None:
        """Record nothing from now on, in this process and its children."""
        with self._lock:
            self._close()
            self._keeps, self._directory = False, None
            self._waiting.clear()
            os.environ[START] = OFF

    @contextmanager
    def span(
        self,
        phase: str,
        *,
        beside: bool = False,
        waits: bool = False,
        watched: Details | None = None,
        **details: Any,
    ) -> Iterator[Details]:
        """A phase; yields its details, which may be added to until it ends.

        Args:
            phase: its name (phases.py).
            beside: the start does not wait for it.
            waits: in it, this process only waits for others.
            watched: what the watchdog tells of where it hangs (``PLACE``, …); it is not written.
            details: numbers and short texts, nothing secret.
        """
        number = self.begin(phase, beside=beside, waits=waits, watched=watched, **details)
        try:
            yield self.open[number][3] if number in self.open else details
        finally:
            self.end(number)

    def begin(
        self,
        phase: str,
        *,
        beside: bool = False,
        waits: bool = False,
        watched: Details | None = None,
        **details: Any,
    ) -> int:
        """As ``span`` where a phase begins and ends in different calls; the number for ``end``."""
        number, mono = next(self._numbers), time.monotonic()
        self._enter_process()
        if not self._keeps:
            return number
        self.open[number] = (phase, mono, threading.get_native_id(), details | (watched or {}))
        flags = {name: True for name, value in (("beside", beside), ("waits", waits)) if value}
        self._put({"event": "begin", "id": number, "phase": phase, **flags, **_shown(details)})
        return number

    def end(self, number: int, **details: Any) -> None:
        """End the phase with this number."""
        found = self.open.pop(number, None)
        if found is not None:
            self.last_ends[found[2]] = time.monotonic()
            # What began within it in this thread is over, too, where an error kept it from ending.
            for inner in [other for other, (_, _, thread, _) in self.open.items() if other > number]:
                if self.open[inner][2] == found[2] == threading.get_native_id():
                    self.open.pop(inner)
            self._put({"event": "end", "id": number, **_shown({**found[3], **details})})

    def point(self, phase: str, **details: Any) -> None:
        """Something that happened at this moment."""
        self._enter_process()
        if self._keeps:
            self._put({"event": "point", "phase": phase, **_shown(details)})

    def told_ready(self, **details: Any) -> bool:
        """Note that the engine answers requests from now on; False where that is known already."""
        if self.ready or self._directory is None:
            return False
        self.ready = True
        self.point("ready", **details)
        return True

    def past_span(self, phase: str, began: float, ended: float, *, beside: bool = False, **details: Any) -> None:
        """A phase that is over, with its times in seconds of the monotonic clock."""
        number = next(self._numbers)
        if self._keeps:
            flags = {"beside": True} if beside else {}
            self._put({"event": "begin", "id": number, "phase": phase, "mono": began, **flags})
            self._put({"event": "end", "id": number, "mono": ended, **_shown(details)})

    def note_imports(self) -> None:
        """The plugin is called: until now this process was being started, and imported the engine."""
        now = time.monotonic()
        self._registered = now
        self.past_span(IMPORTS, process_began(), now)

    def since_registered(self, phase: str) -> None:
        """A phase that has gone on since the plugin was called in this process, and ends now; once for a process."""
        registered, self._registered = self._registered, None
        if registered is not None:
            self.past_span(phase, registered, time.monotonic())

    def _put(self, fields: Details) -> None:
        mono, wall = time.monotonic(), time.time()
        at = fields.setdefault("mono", mono)
        fields["wall"] = round(wall - mono + at, 6)
        fields["tid"] = threading.get_native_id()
        with self._lock:
            if self._directory is not None:
                self._write(fields)
            elif self._keeps and len(self._waiting) < _MOST_WAITING:
                self._waiting.append(fields)

    def _write(self, fields: Details) -> None:
        if self._written > MOST_BYTES or self._directory is None:
            return
        try:
            if self._descriptor < 0:
                self._descriptor = _open_file(self._directory)
            line = _line(fields if self.rank is None else {**fields, "rank": self.rank})
            self._written += len(line)
            if self._written > MOST_BYTES:
                line = _line({"event": "cut", "mono": fields["mono"], "wall": fields["wall"], "tid": fields["tid"]})
            os.write(self._descriptor, line)
        except Exception as error:  # a full disk, a directory that somebody removed: the start goes on without
            logger.debug("no more events of the start are written: %s", error)
            self._written = MOST_BYTES + 1

    def _after_fork(self) -> None:
        # Another thread may have held the lock. Nothing is written yet: the child may be about to run another program.
        self._lock, self._forked = threading.RLock(), True

    def _enter_process(self) -> None:
        """In a process that was forked from one that recorded: begin anew."""
        if not self._forked:
            return
        kept, self._forked, self._keeps = self._keeps, False, False
        self.rank, self.open = None, {}
        self._waiting.clear()
        self._close()
        if kept:
            self.note_process()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._written = -1, 0


def _shown(details: Details) -> Details:
    """As fields of an event: those whose names begin with an underscore are for this process alone."""
    shown = {name: value for name, value in details.items() if not name.startswith("_")}
    return {"details": shown} if shown else {}


def _line(fields: Details) -> bytes:
    return json.dumps({"v": VERSION, "pid": os.getpid(), **fields}, default=str).encode() + b"\n"


def _open_file(directory: str) -> int:
    name = f"{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns() // 1_000_000}.jsonl"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(os.path.join(directory, name), flags, 0o600)
    os.write(descriptor, _line({"event": "file", "node": os.uname().nodename, "mono": time.monotonic()}))
    return descriptor


def process_began() -> float:
    """When this process was made, in seconds of the monotonic clock; now where the kernel does not tell.

    The kernel counts in hundredths of a second since the machine was started. What `exec` replaced counts, too.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - max(0.0, age)
    except (OSError, ValueError, IndexError):
        return time.monotonic()


def process_name() -> str:
    """The name that multiprocessing gave this process, or of the module that it runs (`python -m`); "" for others."""
    module = sys.modules.get("multiprocessing.process")
    name = str(module.current_process().name) if module is not None else ""
    if name not in ("", "MainProcess"):
        return name
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return str(spec.name).removesuffix(".__main__").rpartition(".")[2] if spec is not None else ""


recorder = Recorder()
"""The one of this process."""
