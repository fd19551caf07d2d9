"""Whether 3FS's daemon can tell its clients apart: it does so by the thread ids that it sees.

The daemon removes what a client registered when 3fs-virt/iovs is closed by the thread with the same id. Clients that
are not in its PID namespace, nor in one below, all have the id 0: the end of one takes buffers and rings of all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_COMMAND = "hf3fs_fuse_main"


@dataclass(frozen=True)
class VisibleDaemon:
    """A daemon that this process can see.

    Attributes:
        pid: its process id here.
        tells_apart: whether it sees the thread ids of this process.
    """

    pid: int
    tells_apart: bool


def find_daemon(proc: Path = Path("/proc")) -> VisibleDaemon | None:
    """The daemon, or None: it runs outside this PID namespace, on the host or in another container, or not at all.

    A process that is visible here is in this PID namespace or in one below; from below, this one is not seen.
    """
    here = _namespace(proc / "self")
    for entry in sorted(proc.glob("[0-9]*")):
        try:
            if (entry / "comm").read_text().strip() == _COMMAND:
                return VisibleDaemon(int(entry.name), _namespace(entry) == here)
        except OSError:  # it has ended, or is not ours to look at
            continue
    return None


def _namespace(process: Path) -> str:
    return os.readlink(process / "ns" / "pid")
