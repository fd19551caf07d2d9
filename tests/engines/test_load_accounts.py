"""What each rank says of its load: a line, a record with the numbers, and the first rank's sum."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engine_loader.engines.common import accounts
from engine_loader.engines.common.accounts import NUMBERS, sum_line
from engine_loader.engines.common.cache_hooks import tell_wait
from engine_loader.engines.common.reading import read_weights
from engine_loader.settings import LoaderSettings
from tests.support.checkpoints import checkpoint, entry

RANK = """
import json, logging, sys, threading, torch
from engine_loader.engines.common.reading import read_weights
from engine_loader.settings import LoaderSettings

path, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
records = []

class Keep(logging.Handler):
    def emit(self, record):
        records.append([record.levelname, record.getMessage(), record.engine_loader_load])

log = logging.getLogger("engine")
log.setLevel(logging.DEBUG)
log.addHandler(Keep())
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
settings = LoaderSettings(read_mode="buffered")
skip = (lambda name: name == "b") if rank else None
list(read_weights([path], settings, log=log, show_progress=False, skip=skip))
for thread in threading.enumerate():
    if thread.name == "engine-loader-accounts":
        thread.join(60)
torch.distributed.barrier()
print(json.dumps(records))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint({"a": entry("U8", [1 << 20]), "b": entry("U8", [1 << 19])}))
    return path


def test_one_rank_tells_bytes_read_and_leaves_a_record(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("engine_loader.test")
    settings = LoaderSettings(read_mode="buffered")
    with caplog.at_level(logging.INFO):
        list(read_weights([str(model)], settings, log=log, show_progress=False))
    (record,) = [record for record in caplog.records if hasattr(record, NUMBERS)]
    assert record.getMessage().startswith("b10_3fs: loaded 1.50 MiB (2 tensors, 1 file) in ")
    assert record.getMessage().endswith(", read 1.50 MiB")
    numbers = getattr(record, NUMBERS)
    seconds = numbers.pop("seconds")
    assert seconds > 0
    peak = numbers.pop("peak_buffer_bytes")
    assert peak > 0
    assert json.loads(json.dumps(numbers)) == {
        "rank": 0,
        "ranks": 1,
        "tensors": 2,
        "files": 1,
        "bytes_offered": 3 << 19,
        "bytes_kept": 3 << 19,
        "bytes_read": 3 << 19,
        "source": "posix",
        "engine": numbers["engine"],
        "modes": ["buffered"],
        "retries": 0,
        "first_retry": "",
        "slowest_file": "",
        "notes": [],
    }


def test_the_first_of_several_ranks_adds_them_up(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(model), str(tmp_path / "store")]
    children = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    answers = [child.communicate(timeout=240) for child in children]
    assert [child.returncode for child in children] == [0, 0], answers
    first, second = (json.loads(answer[0].splitlines()[-1]) for answer in answers)
    ((level, line, numbers),) = second
    assert (level, numbers["rank"], numbers["ranks"], numbers["bytes_kept"]) == ("DEBUG", 1, 2, 1 << 20)
    assert line.startswith("b10_3fs: rank 1 of 2: loaded 1.00 MiB (1 tensor")
    (own, total) = first
    assert own[:1] == ["INFO"] and own[1].startswith("b10_3fs: rank 0 of 2: loaded 1.50 MiB (2 tensors, 1 file) in ")
    assert total[0] == "INFO"
    assert total[1].startswith("b10_3fs: all 2 ranks: loaded 2.50 MiB, read 2.50 MiB, in ")
    assert total[2] == {"all_ranks": [own[2], numbers]}


def test_the_sum_names_the_slowest_rank_and_the_reads_that_were_tried_again() -> None:
    def load(rank: int, seconds: float, retries: int) -> dict[str, Any]:
        return {"rank": rank, "bytes_kept": 1 << 30, "bytes_read": 5 << 28, "seconds": seconds, "retries": retries}

    assert sum_line([load(0, 1.0, 0), load(1, 2.0, 3)]) == (
        "all 2 ranks: loaded 2.00 GiB, read 2.50 GiB, in 2.00 s, 1.07 GB/s together; the slowest is rank 1; "
        "3 reads tried again"
    )


def test_a_rank_that_never_comes_holds_up_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Store:
        def __init__(self) -> None:
            self.values: dict[str, str] = {}

        def set(self, key: str, value: str) -> None:
            self.values[key] = value

        def check(self, keys: list[str]) -> bool:
            return set(keys) <= set(self.values)

    store = Store()
    monkeypatch.setattr(accounts, "_place", lambda: (0, 2))
    monkeypatch.setattr(accounts, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(accounts.torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    log = logging.getLogger("engine_loader.test")
    with caplog.at_level(logging.INFO):
        tensors = dict(read_weights([str(model)], LoaderSettings(), log=log, show_progress=False))
        for thread in threading.enumerate():
            if thread.name == "engine-loader-accounts":
                thread.join(60)
                assert not thread.is_alive()
    assert set(tensors) == {"a", "b"}
    assert len([record for record in caplog.records if hasattr(record, NUMBERS)]) == 1


def test_a_wait_for_a_restore_is_told_where_it_was_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = iter([10.0, 10.05, 20.0, 22.34])
    monkeypatch.setattr("engine_loader.engines.common.cache_hooks.time.monotonic", lambda: next(times))
    log = logging.getLogger("engine_loader.test")
    with caplog.at_level(logging.INFO):
        tell_wait(log, lambda: None)
        tell_wait(log, lambda: None)
    assert [record.getMessage() for record in caplog.records] == [
        "compile cache: this start waited 2.3 s for the restore"
    ]
