"""How a direct load takes memory, and how it ends when it is interrupted."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.find import SafetensorsFiles
from engine_loader.loading.safetensors_store import SafetensorsStore
from engine_loader.loading.shards import open_files
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from engine_loader.sources.posix import PosixSource
from engine_loader.transfer.plan import extent
from engine_loader.transfer.python.python_readers import PythonReaders
from tests.support.resources import left_open, open_resources

MIB = 1 << 20

CHILD = """
import json, sys, torch
from torch import nn
from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(1)
path, way = sys.argv[1:]
model = nn.ParameterDict({f"t{number}": nn.Parameter(torch.ones(4 << 20), requires_grad=False) for number in range(24)})
settings = load_settings({"engine": way}).settings.loader

def load():
    with DirectLoad(model) as session, torch.no_grad():
        for name, weight in stream_weights([path], settings, direct=session):
            model[name].copy_(weight)

with DirectLoad(model) as session:  # what is imported late is no part of it
    next(iter(stream_weights([path], settings, direct=session)))
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
load()
print(json.dumps({"peak": (kib("VmHWM") - before) * 1024, "right": all(int(p[0]) == int(p[-1]) == int(n[1:]) + 2 for n,
p in model.items())}))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "model.safetensors"
    save_file({f"t{number}": torch.full((4 * MIB,), float(number + 2)) for number in range(24)}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "python"])
def test_peak_memory_beyond_the_parameters(way: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(path), way], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["right"]
    assert answer["peak"] < 64 * MIB


@pytest.fixture
def alarm_is_ctrl_c() -> Iterator[None]:
    """The alarm does what Ctrl-C does. (pytest-timeout's own alarm is off meanwhile.)"""
    before, left = signal.signal(signal.SIGALRM, signal.default_int_handler), signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.signal(signal.SIGALRM, before)
    signal.setitimer(signal.ITIMER_REAL, *left)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_ends_the_load_with_nothing_left(path: Path, alarm_is_ctrl_c: None) -> None:
    """Either the load is complete, or it ends by KeyboardInterrupt; no thread writes afterwards."""
    model = nn.ParameterDict(
        {f"t{number}": nn.Parameter(torch.zeros(4 * MIB), requires_grad=False) for number in range(24)}
    )
    settings = load_settings({"threads": 2}).settings.loader
    before = open_resources()
    interrupted = 0
    for delay_ms in (1, 3, 6, 10, 15, 25, 40, 60):
        for parameter in model.values():
            parameter.fill_(float("nan"))
        complete = False
        signal.setitimer(signal.ITIMER_REAL, delay_ms / 1e3)
        with contextlib.suppress(KeyboardInterrupt):
            try:
                with DirectLoad(model) as session, torch.no_grad():
                    for name, weight in stream_weights([str(path)], settings, direct=session):
                        model[name].copy_(weight)
                complete = True
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        interrupted += not complete
        filled = [bool(torch.isfinite(parameter).all()) for parameter in model.values()]
        assert all(filled) or not complete
        assert left_open(before) == []  # a thread that reads headers ends by itself
    assert interrupted


def test_ctrl_c_while_a_reader_is_closed_closes_its_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_resources()
    reader = SafetensorsStore(
        open_files(PosixSource(), SafetensorsFiles((str(path),))),
        "posix",
        load_settings({"engine": "python"}).settings.loader,
    )
    destination = torch.empty(4)
    reader.read([extent(0, 100, 16, destination.data_ptr())], destination)

    def interrupted(readers: PythonReaders, close: Callable[[PythonReaders], None] = PythonReaders.close) -> None:
        close(readers)
        raise KeyboardInterrupt

    monkeypatch.setattr(PythonReaders, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.close()
    assert left_open(before, 10) == []


def test_a_kill_leaves_nothing_that_a_loader_would_take_for_a_model(path: Path) -> None:
    """The load writes to memory only: what is on disk is as it was, and the next load is whole."""
    before = path.stat()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), "auto"], stdout=subprocess.PIPE, text=True)
    time.sleep(1.5)
    child.kill()
    child.communicate()
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.safetensors"]
