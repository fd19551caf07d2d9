"""The account of a start, in the process that begins it: what is expected of it, and what it leaves for later starts.

Nothing here raises, and the engine waits for nothing of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....home import home_expanded
from ....report.events import process_began, recorder
from ....report.metrics import set_gauges, write_textfile
from ....report.prediction import prediction
from ....report.reading.cache_use import restore_status
from ....report.reading.timeline import read_timeline
from ....report.spans import send_spans
from ....report.starts import Identity, Summary, begin_start, identity_of, read_summaries, write_summary
from ....settings import load_settings
from .opened_last import keep_opened
from .phase_wrappers import never_raising, watch, watchdogs
from .restored_last import keep_restored
from .start_hints import plan_hint, tell_bytecode


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
        tell_bytecode(engine, log)
    watch(log)


@never_raising
def ready(log: logging.Logger) -> None:
    """The engine answers requests from now on: end the account, once."""
    for watchdog in watchdogs:
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
    send_spans(timeline)
    hint = plan_hint(timeline)
    if hint is not None:
        log.info("%s", hint)
    path = load_settings().settings.report.metrics_file
    if path is not None:
        try:
            write_textfile(home_expanded(path), timeline)
        except OSError as error:
            log.warning("report.metrics_file: %s: %s", path, error.strerror)
    keep_opened(directory, identity.engine)
    keep_restored(directory, identity.engine)
