"""A restore or a save beside the engine: started, waited for with a time-out, and logged.

No function here raises, and none waits for longer than its time-out.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ...escaping import printable
from ...home import first_writable, temporary_directory_name
from ...report.events import PLACE, recorder
from ...report.phases import RESTORE, SAVE
from ...settings import CompileCacheSettings
from ..directories import STATE
from ..space import mib
from ..trust import make_private
from .job import Job
from .locks import NodeLock
from .outcome import Outcome

logger = logging.getLogger(__name__)

_KILL_GRACE_S = 2.0
_STDERR_CHARS = 400
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])


class Running:
    """An operation in a process of its own.

    Args:
        job: what to do.
        settings: how.
        timeout_s: seconds until the operation is given up and its process killed.
        then: called with the outcome, in a thread of this process.
        lock: held while the operation runs. A free lock is taken by the constructor; else the operation waits for
            it.
    """

    def __init__(
        self,
        job: Job,
        settings: CompileCacheSettings,
        timeout_s: float,
        then: Callable[[Outcome], None] = lambda _: None,
        lock: NodeLock | None = None,
    ) -> None:
        self._job = replace(job, settings=settings.model_dump(mode="json"))
        self._timeout_s = timeout_s
        self._then = then
        self._outcome = Outcome("failed")
        self._lock = lock
        self._has_lock = lock is not None and lock.acquire(0)
        self._thread = threading.Thread(target=self._run, name=f"compile-cache-{job.action}", daemon=True)
        self._thread.start()

    def result(self, timeout_s: float | None = None) -> Outcome | None:
        """The outcome; None when it is not there after ``timeout_s`` seconds."""
        self._thread.join(timeout_s)
        return None if self._thread.is_alive() else self._outcome

    def _run(self) -> None:
        watched = {PLACE: self._job.settings.get("directory", "")}
        with recorder.span(RESTORE if self._job.action == "restore" else SAVE, beside=True, watched=watched) as details:
            self._perform(details)
        try:
            self._then(self._outcome)
        except Exception:
            logger.exception("compile cache: after a %s", self._job.action)

    def _perform(self, details: dict[str, object]) -> None:
        began = time.monotonic()
        try:
            if self._lock is not None and not self._has_lock:
                self._lock.acquire(self._timeout_s)
            self._outcome = run_job(self._job, max(1.0, self._timeout_s - (time.monotonic() - began)))
        except Exception as error:
            self._outcome = Outcome("failed", messages=[f"{type(error).__name__}: {error}"])
        finally:
            if self._lock is not None:
                self._lock.release()
        outcome = self._outcome
        details.update(status=outcome.status, files=outcome.files, bytes=outcome.bytes, verdict=outcome.verdict)


def run_job(job: Job, timeout_s: float) -> Outcome:
    """Carry out a job in a process of its own, which is killed after ``timeout_s`` seconds.

    Job and outcome are files, not pipes: an engine that forks its workers meanwhile hands them the ends of all open
    pipes, which then never close.
    """
    work = job.settings.get("work_directory")
    parent = first_writable((work, temporary_directory_name())) or _made(job.home() / STATE)
    if parent is None:
        where = f"neither a temporary directory nor {job.home()} can be written"
        return Outcome("failed", messages=[f"{where}: set compile_cache.work_directory or TMPDIR"])
    with tempfile.TemporaryDirectory(prefix="compile-cache-", dir=parent, ignore_cleanup_errors=True) as directory:
        files = [Path(directory, name) for name in ("job", "outcome", "errors")]
        files[0].write_text(json.dumps(job.to_json()))
        paths = [_PACKAGE_PARENT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        with files[2].open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine_loader.compile_cache.process.worker", *map(str, files[:2])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                close_fds=False,  # so that it is spawned without a pipe for its errors; ours are not inheritable
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            what = f"the {job.action} took longer than {timeout_s:g} s (compile_cache.{job.action}_timeout_s)"
            return Outcome("interrupted", messages=[f"{what}: does {job.settings.get('directory', '')} hang?"])
        try:
            return Outcome(**json.loads(files[1].read_text()))
        except (OSError, ValueError, TypeError):
            said = files[2].read_text(errors="replace").strip()[-_STDERR_CHARS:]
            return Outcome("failed", messages=[f"its process ended with status {status}: {said}"])


def _made(directory: Path) -> str | None:
    """The directory, made if it was missing; None where this user cannot write it."""
    with suppress(OSError):
        make_private(directory)
    return first_writable((directory,))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, so that it cleans up, then SIGKILL. A process that hangs in the kernel is not waited for."""
    process.terminate()
    try:
        process.wait(_KILL_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


def log_restore(log: logging.Logger, job: Job, where: str, outcome: Outcome) -> None:
    """Log one line about a restore, and a warning for each of its messages."""
    source = f"{where} ({job.key.short})"
    if outcome.status == "restored":
        log.info(
            "compile cache: restored %d files, %s, in %.1f s from %s",
            outcome.files,
            mib(outcome.bytes),
            outcome.seconds,
            source,
        )
    elif outcome.status == "suspect":
        log.info("compile cache: nothing was restored from %s", source)
    elif outcome.status == "complete":
        log.info("compile cache: everything that %s has is in place already", source)
    elif outcome.status == "nothing":
        log.info(
            "compile cache: %s has nothing yet for %s; what this engine compiles will be saved", where, job.key.prefix
        )
    for note in outcome.notes:
        log.info("compile cache: %s", printable(note))
    _warn(log, outcome, "this engine starts without it")


def log_save(log: logging.Logger, job: Job, where: str, outcome: Outcome) -> None:
    """Log one line with the verdict and one about the save, and a warning for each of its messages."""
    if outcome.verdict:
        log.info(
            "compile cache: %s%s", outcome.verdict, "".join(f"; {printable(reason)}" for reason in outcome.reasons)
        )
    if outcome.status == "saved":
        log.info(
            "compile cache: saved %d files, %s (%s packed), in %.1f s to %s (%s)",
            outcome.files,
            mib(outcome.bytes),
            mib(outcome.pack_bytes),
            outcome.seconds,
            where,
            job.key.short,
        )
    elif outcome.status == "nothing" and outcome.notes:  # there may be something new, and this says why it is left
        log.info("compile cache: nothing was saved: %s", printable("; ".join(outcome.notes)))
    elif outcome.status == "complete" or (outcome.status == "nothing" and not outcome.messages):
        log.info("compile cache: nothing new to save")
    if outcome.status != "nothing":
        for note in outcome.notes:
            log.debug("compile cache: %s", printable(note))
    _warn(log, outcome, "nothing was saved")


def _warn(log: logging.Logger, outcome: Outcome, consequence: str) -> None:
    for message in outcome.messages:
        log.warning("compile cache: %s%s", printable(message), f"; {consequence}" if outcome.failed else "")
