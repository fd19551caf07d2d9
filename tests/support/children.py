"""Runs a part of a test in a child of this process: as another user, or where a mistake would end the process."""

import faulthandler
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

import torch

NOBODY = 65534


class ChildDied(AssertionError):
    """The child ended by a signal, or its code raised what nobody expected."""


def in_child(function: Callable[[], Any], *, user: int | None = None, timeout_s: int = 120) -> Any:
    """What ``function`` returns in a forked child; the child has to be done in ``timeout_s``.

    Raises:
        ChildDied: by which signal, or the traceback.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(function, user, timeout_s, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ChildDied(f"the child died of {signal.Signals(os.WTERMSIG(status)).name}")
    worked, result = pickle.loads(answer)
    if not worked:
        raise ChildDied(result)
    return result


def _run(function: Callable[[], Any], user: int | None, timeout_s: int, writing: int) -> None:
    try:
        faulthandler.disable()  # the parent says by which signal a child died
        torch.set_num_threads(1)  # OpenMP's threads do not come along, and would be waited for
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        answer = (True, function())
    except BaseException:
        answer = (False, traceback.format_exc())
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(pickle.dumps(answer))
    os._exit(0)
