"""A plugin of the engines' that writes down what a process of a start is like: module state, environment, limits.

`audited(directory)` gives the variables with which an engine's server finds the plugin; each process of the start then
leaves a file there when it loads plugins, which all do before anything of theirs runs.
"""

import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

_DIRECTORY = "PROCESS_STATE_DIRECTORY"
_ENTRY = "".join(
    f"[{group}]\nzz_process_state = tests.support.process_state:write\n"
    for group in ("vllm.general_plugins", "sglang.srt.plugins")
)
_PLAIN = (bool, int, float, str, bytes, type(None))
_PACKAGES = (
    "vllm",
    "sglang",
    "torch",
    "transformers",
    "numpy",
    "engine_loader",
    "triton",
    "multiprocessing",
    "huggingface_hub",
)
_MOST_CHARS = 4000


def audited(directory: Path) -> dict[str, str]:
    """Variables for the server; `directory` gets a file NAME.json for each process of the start by its name."""
    package = directory / "package"
    info = package / "process_state-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: process-state\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_ENTRY)
    root = Path(__file__).parents[2]
    return {_DIRECTORY: str(directory), "PYTHONPATH": os.pathsep.join([str(package), str(root)])}


def read(directory: Path) -> dict[str, dict[str, Any]]:
    """Name of a process -> its state."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def write() -> None:
    """The plugin."""
    if os.path.basename(sys.argv[0]) == "registry.py":
        return  # vLLM looks at a model's class in a program of its own, where it has not kept what it found
    import torch

    process = multiprocessing.current_process()
    parent = multiprocessing.parent_process()
    state = {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "parent": None if parent is None else [parent.name, parent.pid],
        "group": [os.getpgrp(), os.getsid(0)],
        "daemon": process.daemon,
        "argv": sys.argv,
        "path": sys.path,
        "directory": os.getcwd(),
        "environ": dict(os.environ),
        "cpus": sorted(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT" in name},
        "signals": {str(number): repr(signal.getsignal(number)).split(" at ")[0] for number in signal.valid_signals()},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "torch_threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "level": logging.getLogger("vllm").level,
        "stdin": os.readlink("/proc/self/fd/0"),
        "modules": {name: _plain_globals(module) for name, module in list(sys.modules.items()) if _is_ours(name)},
    }
    path = Path(os.environ[_DIRECTORY], f"{process.name}.json")
    path.write_text(json.dumps(state))


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in _PACKAGES


def _plain_globals(module: ModuleType) -> dict[str, str]:
    found = {}
    for name, value in list(vars(module).items()):
        if not name.startswith("__") and _is_plain(value):
            found[name] = _in_order(value)[:_MOST_CHARS]
    return found


def _in_order(value: Any) -> str:
    """The value as text, everything in it sorted: much is made from sets, whose order is another in each process."""
    if type(value) is dict:
        return f"{{{', '.join(sorted(f'{_in_order(key)}: {_in_order(item)}' for key, item in value.items()))}}}"
    if type(value) in (list, tuple, set, frozenset):
        return f"[{', '.join(sorted(map(_in_order, value)))}]"
    return repr(value)


def _is_plain(value: Any, depth: int = 3) -> bool:
    # Only of these very types: mappings that load what is asked for must not be asked.
    if type(value) in (list, tuple, set, frozenset):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    if type(value) is dict:
        return depth > 0 and all(_is_plain(item, depth - 1) for pair in value.items() for item in pair)
    return type(value) in _PLAIN
