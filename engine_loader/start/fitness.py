"""Whether a process may be forked in place of a new one: reasons against it, each one line for a person.

A forked child has the memory of its parent and none of its threads, so what is looked at is what a copy of memory gets
wrong: threads, accelerators, descriptors, and an environment that was read too early.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing.spawn
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping

_ACCELERATORS = re.compile(r"/dev/(nvidia|kfd|dri/|xpu|davinci|accel|habana|neuron)")
_INITIALISED = (("torch.cuda", "CUDA or HIP"), ("torch.xpu", "XPU"))
_SYMBOLS = (("libgomp", "GOMP_parallel"), ("libiomp5", "__kmpc_fork_call"), ("libomp", "__kmpc_fork_call"))
"""Beginning of a library's name -> a function that it is preloaded for."""
_EXECUTABLE = multiprocessing.spawn.get_executable()


def why_not_here(*, descriptors: bool = True) -> str | None:
    """The reason why this process may not be copied now; None where nothing speaks against it.

    Args:
        descriptors: whether sockets that it has open speak against it.

    Forks a process that ends at once: libraries that stop their threads at a fork (OpenBLAS) have done so afterwards,
    as they will have at the real one, and whatever thread is left would be missing in a copy.
    """
    if threading.current_thread() is not threading.main_thread():
        return f"this is not the main thread but {threading.current_thread().name}"
    _fork_and_end()
    names = sorted(_thread_names())
    if len(names) > 1:
        return f"the process has {len(names)} threads ({', '.join(names)})"
    return _accelerator() or (_descriptor() if descriptors else None)


def why_not_started_so() -> str | None:
    """The reason why the next process has to be started as multiprocessing would start it."""
    executable = multiprocessing.spawn.get_executable()
    if executable != _EXECUTABLE:
        # vLLM binds to NUMA nodes by a wrapper in place of Python.
        return f"processes are to be started by {os.fsdecode(executable or b'')}"
    return None


def changed_variables(before: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    """Names of variables that were set, removed, or given another value."""
    return {name for name in {*before, *now} if before.get(name) != now.get(name)}


def why_not_with(
    before: Mapping[str, str], now: Mapping[str, str], may_differ: Collection[str] | Callable[[str], bool]
) -> str | None:
    """The reason why modules that were imported in one environment may be wrong in another.

    Args:
        before: the environment in which they were imported.
        now: that of the process that wants a child.
        may_differ: the variables that are read when they are used, or are seen to in the child.
    """
    allowed = may_differ if callable(may_differ) else may_differ.__contains__
    names = sorted(name for name in changed_variables(before, now) if not allowed(name))
    return f"what was imported may have read {', '.join(names)} before it was changed" if names else None


def why_not_preloaded(libraries: str) -> str | None:
    """The reason why LD_PRELOAD of a new process would have other functions called than are called here.

    A library of the list comes before all others where a function is looked up. That is so here, too, if its functions
    are those that the whole process sees, whatever other copies of it packages have brought.

    Args:
        libraries: the value of LD_PRELOAD for the child.
    """
    seen = ctypes.CDLL(None)
    for path in filter(None, re.split("[: ]", libraries)):
        name = os.path.basename(path)
        symbol = next((symbol for prefix, symbol in _SYMBOLS if name.startswith(prefix)), None)
        if symbol is None:
            return f"LD_PRELOAD names {path}"
        function = getattr(seen, symbol, None)
        address = ctypes.cast(function, ctypes.c_void_p).value if function is not None else None
        if address is None or _file_at(address) != os.path.realpath(path):
            return f"LD_PRELOAD names {path}, and {symbol} is not that library's here"
    return None


def _fork_and_end() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _thread_names() -> Iterator[str]:
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm", encoding="utf-8", errors="replace") as file:
            yield file.read().strip()


def _accelerator() -> str | None:
    for name, said in _INITIALISED:
        module = sys.modules.get(name)
        if module is not None and module.is_initialized():
            return f"{said} is initialised"
    for path in (*_open_files().values(), *_mapped_files()):
        if _ACCELERATORS.match(path):
            return f"{path} is open"
    return None


def _descriptor() -> str | None:
    """What this process has opened that two processes cannot share; what it has inherited is closed in the child."""
    for descriptor, path in _open_files().items():
        if descriptor > 2 and fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISSOCK(mode) or path.startswith("anon_inode:"):
                return f"{path} is open"
    return None


def _open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
    return found


def _file_at(address: int) -> str | None:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            first, _, last = line.split(maxsplit=1)[0].partition("-")
            if int(first, 16) <= address < int(last, 16):
                return f"/{line.rstrip().partition('/')[2]}"
    return None


def _mapped_files() -> Iterator[str]:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            path = line.rstrip("\n").partition("/")[2]
            if path:
                yield f"/{path}"
