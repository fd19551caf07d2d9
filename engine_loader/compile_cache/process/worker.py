"""A process of its own for a restore or a save, so that neither the engine's interpreter lock nor a hanging store is
shared with the engine.

    python -m engine_loader.compile_cache.process.worker JOB OUTCOME        (files; both are JSON)

It imports no torch and no engine. When its parent ends, a restore is given up and a save is finished.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ...report.events import recorder
from ...settings import CompileCacheSettings
from .job import Job
from .operations import perform

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IDLE_CLASS = 3 << 13


def run(text: str) -> dict[str, Any]:
    """A job as JSON -> an outcome as JSON."""
    value = json.loads(text)
    job = Job.from_json(value)
    recorder.note_process(f"compile cache {job.action}")
    recorder.note_imports()
    if job.background:
        _lower_priority()
    parent = os.getppid()
    may_go_on = (lambda: os.getppid() == parent) if job.action == "restore" else (lambda: True)
    return perform(job, CompileCacheSettings(**job.settings), may_go_on).to_json()


def _lower_priority() -> None:
    with suppress(OSError):
        os.nice(19)
    if number := _IOPRIO_SET.get(os.uname().machine):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(number, 1, 0, _IDLE_CLASS)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # so that what is half-written is removed


def main(job: Path, result: Path) -> int:
    """Carry out the job in the file ``job`` and write its outcome to ``result``; the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        outcome = run(job.read_text())
    except KeyboardInterrupt:
        return 130
    with suppress(FileNotFoundError):  # the process that waited has given up
        result.write_text(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
