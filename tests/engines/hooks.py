"""What tests of engines' hooks share: operations that are only noted."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.engines.common import cache_hooks


@contextmanager
def noted_jobs(events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, no process of this node has restored, and restores and saves are noted as events a little later."""
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", str(tmp_path / "store"))
    monkeypatch.delenv(cache_hooks.STARTED, raising=False)

    def run_job(job: Any, timeout_s: float) -> Outcome:
        time.sleep(0.2)
        events.append(f"{job.action}d {job.key.scope}")
        return Outcome("restored" if job.action == "restore" else "saved", files=1)

    monkeypatch.setattr("engine_loader.compile_cache.process.session.run_job", run_job)
    yield
    os.environ.pop(cache_hooks.STARTED, None)
