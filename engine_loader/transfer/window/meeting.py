"""Where the ranks of a machine meet, and how much memory they may share."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from ...machine import memory

_SHARE_OF_MEMORY = 4
"""The window takes at most this part of what can still be allocated: one half would be a rank's weights elsewhere."""


def meeting_directory() -> tuple[Path | None, str]:
    """A directory that only this user can enter, made if need be; or None, and why there is none.

    It is below XDG_RUNTIME_DIR, or else in /tmp: processes that see another /tmp (other containers) share nothing.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    candidates = [Path(runtime) / "engine-loader"] if os.path.isabs(runtime) and _is_private(Path(runtime)) else []
    candidates.append(Path("/tmp") / f"engine-loader-{os.geteuid()}")
    for path in candidates:
        with suppress(OSError):
            path.mkdir(mode=0o700, exist_ok=True)
            if _is_private(path):
                return path, ""
    return None, f"{candidates[-1]} is not a directory of this user's alone"


def window_bytes(asked: int) -> int:
    """How much of what was asked for this machine, or this container, can give."""
    return min(asked, memory().available // _SHARE_OF_MEMORY)


def _is_private(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077 == 0
