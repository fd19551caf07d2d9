"""Processes that end while they read: run as ``python -m tests.transfer.exits KIND FILE ROUNDS``.

Every way to end is tried ROUNDS times, each time in a fork of this process, which runs to the real end of the
interpreter. Prints "WAY: status" for each that did not end as it should.
"""

import ctypes
import os
import random
import signal
import sys
import threading
import time

from engine_loader.settings import LoaderSettings
from engine_loader.sources.registry import make_source
from engine_loader.sources.threefs import channel  # noqa: F401  (imported before the forks, not in each of them)
from tests.transfer.conftest import READERS, Destination, endless, start

STATUS = 3
ENDINGS = {"sys.exit": STATUS, "exception": 1, "os._exit": STATUS, "handler of SIGTERM": STATUS, "exit of C": STATUS,
           "SIGTERM": -signal.SIGTERM, "end": 0}  # fmt: skip
LONGEST_S = 60


def end(way: str) -> None:
    if way == "sys.exit":
        sys.exit(STATUS)
    if way == "exception":
        raise RuntimeError("as the test wants it")
    if way == "os._exit":
        os._exit(STATUS)
    if way == "exit of C":
        ctypes.CDLL(None).exit(STATUS)
    if way == "handler of SIGTERM":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(STATUS))
    if way != "end":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LONGEST_S)


def begin_to_read(kind: str, path: str) -> list[object]:
    """What keeps reading until the process ends: with a thread that waits for it, which is in the library then."""
    source = make_source("usrbio" if kind.startswith("usrbio") else "posix", settings=LoaderSettings())
    file = source.open(path)
    readers = READERS["python" if kind.endswith("python") else "native"](threads=2)
    target = Destination(1 << 20)
    transfers = [start(readers, [file], endless(1 << 20)[:4096], target) for _ in range(2)]
    threading.Thread(target=transfers[0].wait, daemon=True).start()
    return [file, readers, target, transfers]


kept: list[object] = []
kind, path, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(rounds * len(ENDINGS)):
    way = list(ENDINGS)[number % len(ENDINGS)]
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        kept = begin_to_read(kind, path)
        time.sleep(random.Random(number).random() * 0.03)
        end(way)
        break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != ENDINGS[way]:
        print(f"{way}: {status}", flush=True)
