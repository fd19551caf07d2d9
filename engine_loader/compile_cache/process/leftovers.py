"""What restores that were killed left in the local caches."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

from ..directories import STATE
from ..unpacking.staging import STAGING
from .use import NOTES


def clear_leftovers(directory: Path, age_s: float) -> int:
    """Delete staging directories that are older than ``age_s`` seconds, and notes of engines long gone; how many."""
    count = 0
    state = directory / STATE
    for pattern in (f"{STAGING}*", f"{NOTES}/*"):
        for path in state.glob(pattern):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > age_s:
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()
                    count += 1
    return count
