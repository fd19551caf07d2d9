"""Weights are brought into the page cache while an engine imports, by a process of its own (``page_warmer``)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from .page_reading import Ranges
from .page_warmer import name_of, order

_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from engine_loader.start.page_warmer import main; main()"


@dataclass(frozen=True)
class WarmingAccount:
    """What became of it.

    Attributes:
        read: bytes that were brought into the page cache.
        resident: bytes that were there already.
        size: bytes of all files.
        reason: why it ended before all was there; "" where it did not.
    """

    read: int = 0
    resident: int = 0
    size: int = 0
    reason: str = ""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """From what ``page_warmer`` says.

        Raises:
            TypeError: it has said something else.
        """
        return cls(**said)


def warm_files(paths: Sequence[str], ranges: Mapping[str, Ranges] | None = None) -> WarmingAccount:
    """Have the files read into the page cache, in their order, by a process that ends before the calling thread does;
    returns when it has ended.

    Args:
        paths: of one directory, in the order in which they will be read.
        ranges: path -> what of it will be read; of files that are not in it, all.
    """
    try:
        return WarmingAccount.of(_run(order(paths, ranges or {})))
    except (OSError, ValueError, TypeError) as error:
        return WarmingAccount(reason=f"the process for it failed ({error})")


def tell_loader_begins(path: str) -> bool:
    """Have whoever warms the directory of ``path`` end, since a loader reads from there now. Waits for nothing.

    Returns:
        Whether somebody was told.
    """
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as telling:
        telling.connect(name_of(path))
        return True
    return False


def _run(asked: bytes) -> dict[str, Any]:
    """What the process says at its end."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # Without site-packages, for it needs none. Its input stays open as long as this process is there.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROGRAM, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(asked)
            process.stdin.flush()
        said = process.stdout.read()
    if not said:
        raise ValueError(f"it ended with status {process.returncode}")
    return dict(json.loads(said))
