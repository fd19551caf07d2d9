"""What this process has open: descriptors and threads of ours, so that a test can say what was left behind."""

import os
import threading
import time
from pathlib import Path

from tests.support.waiting import GENEROUS_S

Resources = dict[tuple[object, ...], str]
"""What is open, by what tells it from all else, and how to call it."""

_NATIVE = ("el-", "3fs-emulator")
_FOREIGN = ("MainThread", "tqdm_monitor")


def open_resources() -> Resources:
    """File descriptors, threads of Python, and threads of the native library and the 3FS emulator.

    Threads that libraries started by themselves come and go, and are not among them.
    """
    return _descriptors() | _native_threads() | _python_threads()


def left_open(before: Resources, timeout_s: float = GENEROUS_S) -> list[str]:
    """What is open now and was not ``before``, once there is nothing of the kind, or after ``timeout_s``.

    A thread that was joined, or will end by itself, is to be seen in /proc for a moment yet.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = [text for key, text in open_resources().items() if key not in before]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def _descriptors() -> Resources:
    found: Resources = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            # By the file as well as by the number, which the next file gets when this one is closed.
            status, target = os.fstat(int(name)), os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # closed meanwhile: the one of the list, for instance
            continue
        found["descriptor", int(name), status.st_dev, status.st_ino] = f"descriptor {name}: {target}"
    return found


def _native_threads() -> Resources:
    found: Resources = {}
    for number in os.listdir("/proc/self/task"):
        try:
            name = Path(f"/proc/self/task/{number}/comm").read_text().strip()
        except OSError:  # it ended meanwhile
            continue
        if name.startswith(_NATIVE):
            found["thread", int(number)] = f"thread {name}"
    return found


def _python_threads() -> Resources:
    threads = [thread for thread in threading.enumerate() if thread.name not in _FOREIGN]
    return {("thread", thread.native_id): f"thread {thread.name}" for thread in threads}
