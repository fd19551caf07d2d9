"""What restores that were killed left in the local caches."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

from ..directories import STATE
from ..unpacking.staging import STAGING
from .use import NOTES

SUSPECT = "suspect-"
"""Begins the names of directories with files that were set aside after a crash."""
_SUSPECT_KEPT_S = 7 * 86400.0


def clear_leftovers(directory: Path, age_s: float) -> int:
    """Delete staging directories that are older than ``age_s`` seconds, notes of engines long gone, and what was set
    aside a week ago; how many.
    """
    count = 0
    state = directory / STATE
    for pattern, oldest_s in ((f"{STAGING}*", age_s), (f"{NOTES}/*", age_s), (f"{SUSPECT}*", _SUSPECT_KEPT_S)):
        for path in state.glob(pattern):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > oldest_s:
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()
                    count += 1
    return count
