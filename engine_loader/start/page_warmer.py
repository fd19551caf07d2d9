"""The process that reads weights into the page cache while an engine imports: no torch, no engine, no settings.

It gets the files' paths, and which of their bytes, on its standard input, and ends when they are read, when that input
ends (the process that started it is gone), or when a loader tells it that it begins to read (``name_of``). It reads in
the order of the files, large pieces at the lowest priority for disks and CPUs, leaves out what lies in the page cache,
and never has more there than the cgroup and the machine have room for (``Budget``). What it did it says as one line of
JSON.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .page_reading import Budget, Ranges, Warming, WarmingEach

LOADER_BEGAN = "the loader began"
_SET_PARENT_DEATH_SIGNAL = 1
_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_LAST_BEST_EFFORT = 2 << 13 | 7  # not the idle class: its reads may starve, and a loader wait for the same pages
_NICE = 19
_URL = re.compile(r"[a-z][a-z0-9+.-]*:/.", re.DOTALL)


def name_of(path: str, server: str = "") -> str:
    """The abstract socket by which a loader tells that it begins to read what is in the directory of ``path``.

    A name of the kernel's and no file: it is gone with the process, however that ends, and only one process has it.

    Args:
        path: of a file, or its URL.
        server: whose URL it is, where that is not the one that everybody means.

    Raises:
        OSError: the directory is not there.
    """
    if _URL.match(path):
        above = re.sub(r"/+", "/", path).rpartition("/")[0]  # pathlib.Path makes one slash of the two of a URL
        place = hashlib.sha256(f"{server}\0{above}".encode()).hexdigest()[:32]
        return f"\0engine_loader-warm-{os.geteuid()}-{place}"
    found = os.stat(os.path.dirname(os.path.abspath(path)))
    return f"\0engine_loader-warm-{os.geteuid()}-{found.st_dev:x}-{found.st_ino:x}"


def listen(path: str, server: str = "") -> socket.socket | None:
    """The socket on which the end is told; None where another process warms this directory already.

    Raises:
        OSError: the directory is not there.
    """
    name = name_of(path, server)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listening.bind(name)
        listening.listen(16)
    except OSError:
        listening.close()
        return None
    return listening


def warm_once(
    paths: Sequence[str],
    lifeline: int | None = None,
    ranges: Mapping[str, Ranges] | None = None,
    before: Sequence[WarmingEach] = (),
) -> dict[str, object]:
    """Read the files into the page cache as far as there is room, unless another process does; what was done.

    Args:
        paths: of one directory, in the order in which they will be read.
        lifeline: see ``warm``.
        ranges: path -> what of it will be read; of files that are not in it, all.
        before: what is read first, in this order and within one budget, if the other process does not.
    """
    try:
        listening = listen(paths[0])
    except OSError as error:
        return {"reason": f"their directory cannot be read ({error.strerror})"}
    if listening is None:
        return {"reason": "another process does it already"}
    with listening:
        budget = Budget()
        for first in before:
            budget = first.budget
            warm_each(first, listening, lifeline)
            if first.reason:
                return {"reason": first.reason}
        warming = Warming(paths, budget, ranges)
        warm(warming, listening, lifeline)
        return warming.account()


def warm_each(warming: WarmingEach, listening: socket.socket | None = None, lifeline: int | None = None) -> None:
    """As ``warm``, and count what was done."""
    began = time.monotonic()
    warm(warming, listening, lifeline)
    warming.add_up(time.monotonic() - began)


def warm(warming: Warming | WarmingEach, listening: socket.socket | None = None, lifeline: int | None = None) -> None:
    """Have several threads read until they are done, a loader begins to read, or the ``lifeline`` ends.

    Args:
        warming: what is read.
        listening: on which a loader tells that it begins; None: none can.
        lifeline: a descriptor that is at its end when the process that asked is gone; None: there is none.
    """
    ended = threading.Event()
    done = at_end_of(warming.readers, lambda: warming.run(ended.is_set))
    try:
        _wait(warming, done, listening, lifeline)
    finally:
        ended.set()
        os.close(done)


def at_end_of(count: int, action: Callable[[], object]) -> int:
    """Have several threads carry out an action, and be told when all have: a descriptor that is at its end then. They
    are not waited for otherwise: a process ends with reads that hang.
    """
    done, tell = os.pipe2(os.O_CLOEXEC)
    left = list(range(count))

    def work() -> None:
        try:
            action()
        finally:
            if left.pop() == 0:  # taken last
                os.close(tell)

    for _ in range(count):
        threading.Thread(target=work, daemon=True).start()
    return done


def _wait(warming: Warming | WarmingEach, done: int, listening: socket.socket | None, lifeline: int | None) -> None:
    poll = select.poll()
    told = -1 if listening is None else listening.fileno()
    for descriptor in {done, told, -1 if lifeline is None else lifeline} - {-1}:
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == done:
                return
            if listening is not None and descriptor == told:
                if _is_told(listening):
                    warming.reason = LOADER_BEGAN
                    return
            elif not os.read(lifeline or 0, 1):
                return


def lower_priority() -> None:
    """Come last, for disks (where their scheduler knows priorities) and CPUs."""
    os.nice(_NICE)
    number = _SYS_IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        # Of this process; its threads inherit it.
        ctypes.CDLL(None).syscall(ctypes.c_long(number), 1, 0, _LAST_BEST_EFFORT)


def be_a_helper(death: signal.Signals) -> None:
    """Live as long as the thread that asked, and come last.

    Args:
        death: sent to this process when that thread has ended.
    """
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, death, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the process that asked says when it ends
    lower_priority()


def main() -> None:
    """What the process does."""
    be_a_helper(signal.SIGKILL)
    asked = read_order()
    os.write(1, json.dumps(warm_once(asked["paths"], 0, asked["ranges"])).encode())
    os._exit(0)  # a thread may be in a read that hangs


def order(paths: Sequence[str], ranges: Mapping[str, Ranges], **more: object) -> bytes:
    """What the process gets on its standard input: a line. It may work in another directory."""
    found = {_absolute(path): found for path, found in ranges.items()}
    return json.dumps({"paths": [_absolute(path) for path in paths], "ranges": found, **more}).encode() + b"\n"


def read_order() -> dict[str, Any]:
    """What ``order`` has made, from the standard input; the process ends where there is none."""
    pieces: list[bytes] = []
    while not pieces or not pieces[-1].endswith(b"\n"):  # JSON has no other end of a line
        pieces.append(os.read(0, 65536))
        if not pieces[-1]:
            sys.exit(0)
    return dict(json.loads(b"".join(pieces)))


def user_of(connection: socket.socket) -> int:
    """The user of the process at the other end of a connection, as the kernel knows it."""
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])


def is_one_of_us(connection: socket.socket) -> bool:
    """Whether at the other end of a connection is a process of this user, or of root."""
    return user_of(connection) in (0, os.geteuid())


def _absolute(path: str) -> str:
    return path if _URL.match(path) else os.path.abspath(path)


def _is_told(listening: socket.socket) -> bool:
    """Whether one that may has told: this user, or root."""
    try:
        connection, _ = listening.accept()
    except OSError:
        return False
    with connection:
        return is_one_of_us(connection)
