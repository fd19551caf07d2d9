"""The phases of a start, the part that all engines share: functions of an engine are wrapped so that each call of them
is a phase. A function that a version of the engine does not have is passed over, and nothing here raises.

Every process of an engine imports this, so it imports little; what only the first one needs is in start_account.py.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....escaping import printable
from ....replacing import wrap
from ....report.events import recorder
from ....report.phases import COMPILE
from ....settings import load_settings
from ....start.opened_files import note_opened

if TYPE_CHECKING:
    from ....report.watchdog import Watchdog

_PURPOSE = "report"
_logger = logging.getLogger(__name__)
watchdogs: list[Watchdog] = []
"""That of this process, where it has one."""


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
def watch(log: logging.Logger) -> None:
    """Tell of stalls of this process as warnings, if it belongs to a start; a second call does nothing."""
    if recorder.directory is None or watchdogs:
        return
    from ....report.watchdog import Watchdog

    stall_s = load_settings().settings.report.stall_s
    if stall_s:
        watchdogs.append(Watchdog(recorder, stall_s, lambda text: log.warning("start: %s", printable(text))))
        watchdogs[0].start()


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


@never_raising
def note_files() -> None:
    """Have a thread note which .so and .pyc files this process has opened, for the first process of the start; to be
    called when this one is ready.
    """
    if recorder.directory is not None:
        threading.Thread(
            target=never_raising(note_opened),
            args=(Path(recorder.directory),),
            name="engine-loader-opened",
            daemon=True,
        ).start()


def note_files_behind(owner: Any, name: str) -> None:
    """Have ``note_files`` called behind each call of a function; does nothing where ``owner`` has no such function."""

    def around(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        note_files()
        return result

    if getattr(owner, name, None) is not None:
        wrap(owner, name, around, purpose="opened")
