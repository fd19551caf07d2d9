"""The phases of a start, the part that all engines share: functions of an engine are wrapped so that each call of them
is a phase. A function that a version of the engine does not have is passed over, and nothing here raises.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...escaping import printable
from ...home import home_expanded
from ...replacing import wrap
from ...report.events import process_began, recorder
from ...report.metrics import set_gauges, write_textfile
from ...report.phases import COMPILE
from ...report.prediction import prediction
from ...report.reading.advice import restore_status
from ...report.reading.timeline import read_timeline
from ...report.starts import Identity, Summary, begin_start, identity_of, read_summaries, write_summary
from ...report.watchdog import Watchdog
from ...settings import load_settings

_PURPOSE = "report"
_logger = logging.getLogger(__name__)


class _Start:
    """The start that this process began.

    Attributes:
        directory: of its events; None: this process has begun none.
        identity: what is started.
        began: when, in seconds of the monotonic clock.
    """

    directory: Path | None = None
    identity: Identity
    began: float


_start = _Start()
_watchdogs: list[Watchdog] = []


def never_raising(action: Callable[..., Any]) -> Callable[..., Any]:
    """``action``, but what it raises goes to the log, at level DEBUG."""

    @functools.wraps(action)
    def quiet(*args: Any, **options: Any) -> Any:
        try:
            return action(*args, **options)
        except Exception:
            _logger.debug("the start's report: %s", action.__name__, exc_info=True)
            return None

    return quiet


def record(owner: Any, name: str, phase: str, *, beside: bool = False, waits: bool = False) -> None:
    """Note each call of a function as a phase; does nothing where ``owner`` has no such function."""

    def around(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with recorder.span(phase, beside=beside, waits=waits):
            return original(*args, **options)

    around_function(owner, name, around)


def around_function(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """As ``replacing.wrap``, beside other wrappers; does nothing where ``owner`` has no such function."""
    if getattr(owner, name, None) is not None:
        wrap(owner, name, around, purpose=_PURPOSE)


@never_raising
def begin(engine: str, model: object, load_format: object, sizes: Mapping[str, Any], log: logging.Logger) -> None:
    """Begin the account of a start, in the process that starts the others; does nothing in those."""
    settings = load_settings().settings.report
    identity = identity_of(engine, str(model), str(load_format), {name: size or 1 for name, size in sizes.items()})
    again = _start.directory is not None
    earlier = read_summaries(settings.directory) if settings.events and recorder.directory is None else []
    directory = begin_start(settings, identity)
    if directory is not None:
        # The time before a later engine of the same process is the user's.
        _start.directory, _start.identity = directory, identity
        _start.began = time.monotonic() if again else process_began()
        log.debug("this start is recorded in %s", directory)
        expected = prediction(identity, earlier)
        if expected is not None:
            log.info("%s", expected)
    watch(log)


@never_raising
def watch(log: logging.Logger) -> None:
    """Tell of stalls of this process as warnings, if it belongs to a start; a second call does nothing."""
    if recorder.directory is None or _watchdogs:
        return
    stall_s = load_settings().settings.report.stall_s
    if stall_s:
        _watchdogs.append(Watchdog(recorder, stall_s, lambda text: log.warning("start: %s", printable(text))))
        _watchdogs[0].start()


@never_raising
def ready(log: logging.Logger) -> None:
    """The engine answers requests from now on: end the account, once."""
    for watchdog in _watchdogs:
        watchdog.stop()
    if recorder.told_ready() and _start.directory is not None:  # else another process began it
        seconds = time.monotonic() - _start.began
        log.info("ready in %.1f s; `engine-loader report` says where the time went", seconds)
        # The engine answers by now: what is made of the events must not hold it up.
        thread = threading.Thread(
            target=_sum_up, args=(_start.directory, _start.identity, seconds, log), name="start-report", daemon=True
        )
        thread.start()


@never_raising
def _sum_up(directory: Path, identity: Identity, seconds: float, log: logging.Logger) -> None:
    """Leave a summary for later starts, and the metrics."""
    timeline = read_timeline(directory)
    write_summary(directory, Summary(seconds, time.time(), identity, restore_status(timeline)))
    set_gauges(timeline)
    path = load_settings().settings.report.metrics_file
    if path is not None:
        try:
            write_textfile(home_expanded(path), timeline)
        except OSError as error:
            log.warning("report.metrics_file: %s: %s", path, error.strerror)


def register_compilation() -> None:
    """Note what torch.compile compiles, by the callbacks that it has for that."""
    from torch._dynamo import callback

    numbers: list[int] = []  # of this process: torch calls back for the outermost compilation only

    @never_raising
    def started(*_: Any) -> None:
        numbers.append(recorder.begin(COMPILE))

    @never_raising
    def ended(*_: Any) -> None:
        recorder.end(numbers.pop())

    callback.callback_handler.register_start_callback(started)
    callback.callback_handler.register_end_callback(ended)
