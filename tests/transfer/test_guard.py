"""The guard of mapped memory beside other handlers of SIGBUS, each case in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

_PRELUDE = """
import ctypes, faulthandler, mmap, os, signal, sys
from engine_loader.transfer.memory.guard import Guard

def cut_short(name):
    with open(os.path.join(sys.argv[1], name), "w+b") as file:
        file.write(bytes(2 * mmap.PAGESIZE))
        file.flush()
        mapped = mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE)
        file.truncate(mmap.PAGESIZE)
    return mapped

def guarded(mapped):
    return Guard(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), len(mapped))

def say_guarded_pages_are_zero():
    assert own[mmap.PAGESIZE] == 0 and guard.tripped
    print("guarded", flush=True)

own, others = cut_short("own"), cut_short("others")
faults = lambda: others[mmap.PAGESIZE]
"""


def run(folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    code = "\n".join([_PRELUDE, *lines, "say_guarded_pages_are_zero()", "faults()"])
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)


GUARD = "guard = guarded(own)"
AGAIN = "again = guarded(cut_short('again'))"
ENABLE = "faulthandler.enable()"


@pytest.mark.parametrize(
    ("lines", "reports"),
    [
        ([GUARD], 0),
        ([ENABLE, GUARD], 1),
        ([GUARD, ENABLE, AGAIN], 1),
        ([ENABLE, GUARD, "faulthandler.disable()", AGAIN], 0),
        ([GUARD, ENABLE, AGAIN, "faulthandler.disable()", ENABLE, AGAIN], 1),
    ],
    ids=["alone", "over faulthandler", "under and over it", "after it", "under and over it twice"],
)
def test_a_fault_of_other_memory_ends_the_process_as_ever(lines: list[str], reports: int, tmp_path: Path) -> None:
    done = run(tmp_path, *lines)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "guarded\n"), done.stderr
    assert done.stderr.count("Fatal Python error: Bus error") == reports
    assert done.stderr.count("in <lambda>") == reports


def test_a_signal_that_a_process_sends_ends_it(tmp_path: Path) -> None:
    done = run(tmp_path, GUARD, "faults = lambda: (os.kill(os.getpid(), signal.SIGBUS), print('alive'))")
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "guarded\n"), done.stderr


def test_a_signal_that_the_program_ignores_is_ignored(tmp_path: Path) -> None:
    ignore = "signal.signal(signal.SIGBUS, signal.SIG_IGN)"
    done = run(tmp_path, ignore, GUARD, "faults = lambda: (os.kill(os.getpid(), signal.SIGBUS), print('alive'))")
    assert (done.returncode, done.stdout) == (0, "guarded\nalive\n"), done.stderr
