"""Weights are brought into the page cache while an engine imports, by a process of its own (``page_warmer``)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from .page_reading import Ranges
from .page_warmer import name_of, order

_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from {module} import main; main()"


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
        # Without site-packages, for it needs none.
        asked = order(paths, ranges or {})
        (said,) = answers_of("engine_loader.start.page_warmer", asked, "-I", "-S", directory="/")
        return WarmingAccount.of(said)
    except (OSError, ValueError, TypeError) as error:
        return WarmingAccount(reason=f"the process for it failed ({error})")


def tell_loader_begins(path: str, server: str = "") -> socket.socket | None:
    """Have whoever warms the directory of ``path`` end, since a loader reads from there now. Waits for nothing.

    Args:
        path: of a file, or its URL.
        server: see ``name_of``.

    Returns:
        A connection to whoever was told, which the caller closes; None: there is nobody.
    """
    telling = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        telling.connect(name_of(path, server))
    except OSError:
        telling.close()
        return None
    return telling


def answers_of(module: str, asked: bytes, *options: str, directory: str | None = None) -> Iterator[dict[str, Any]]:
    """What a process says, a line of JSON at a time, until it ends.

    Args:
        module: whose ``main`` it runs.
        asked: its standard input, which stays open as long as the process is there.
        options: of the interpreter.
        directory: in which it works; None: this process's.

    Raises:
        ValueError: it said nothing, or something else than JSON.
        OSError: it cannot be started.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with subprocess.Popen(
        [sys.executable, *options, "-c", _PROGRAM.format(module=module), root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=directory,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(asked)
            process.stdin.flush()
        said = False
        for line in process.stdout:
            said = True
            yield dict(json.loads(line))
    if not said:
        raise ValueError(f"it ended with status {process.returncode}")
