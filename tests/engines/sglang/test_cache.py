"""The compile cache of one server, restored by the next on a machine that has nothing but the store."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine_loader.report.reading.account import account_of
from engine_loader.report.starts import find_start
from tests.engines.sglang.conftest import VERSION, model_for_sglang
from tests.support.sglang_server import PROBE, SglangServer, patched

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

SAVED = ("compile cache: saved", "compile cache: nothing new to save", "nothing was saved")


@dataclass
class Start:
    """What one start on a fresh machine was like; ``graphs`` are found and not found by inductor."""

    log: str
    graphs: dict[str, int]
    home: Path


def verdict_of(start: Start) -> str:
    """What the log says that the cache was good for; empty where it says nothing."""
    lines = [line.partition("compile cache: ")[2] for line in start.log.splitlines()]
    (verdict,) = [line for line in lines if line.startswith(("hit", "partial", "miss"))] or [""]
    return verdict


class Fleet:
    """Machines that share a model and a store, and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.model = model_for_sglang("llama", directory / "llama", shards=2)
        self.machines = 0

    def start(self, *args: str, save: bool = True, **variables: str) -> Start:
        self.machines += 1
        machine = self.directory / f"machine-{self.machines}"
        for name in ("home", "tmp", "probe"):
            (machine / name).mkdir(parents=True)
        env = {
            "HOME": str(machine / "home"),
            "TMPDIR": str(machine / "tmp"),
            "SGLANG_CACHE_DIR": None,
            "TORCHINDUCTOR_CACHE_DIR": None,
            "TRITON_CACHE_DIR": None,
            "ENGINE_LOADER_COMPILE_CACHE__ENABLED": "true",
            "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(self.store),
            "PYTHONPATH": str(PROBE),
            "SGLANG_PROBE": str(machine / "probe"),
            "SGLANG_PROBE_COMPILES": "silu",
            **variables,
        }
        arguments = ("--load-format", "b10_3fs", *args)
        options = {"env": env, "eager": False, "log_path": machine / "log"}
        with patched(VERSION), SglangServer(VERSION, self.model, *arguments, **options) as server:
            deadline = time.monotonic() + (300 if save else 0)
            while time.monotonic() < deadline and not any(words in server.log for words in SAVED):
                time.sleep(0.2)
        graphs = json.loads((machine / "probe" / "compiled.json").read_text())
        return Start(server.log, graphs, machine / "home")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"))


def test_what_one_server_compiled_the_next_one_finds(fleet: Fleet) -> None:
    cold = fleet.start()
    assert "has nothing yet" in cold.log
    assert verdict_of(cold) == "miss; the store had nothing for this environment and scope"
    assert cold.graphs == {"hit": 0, "miss": 1}
    assert "compile cache: saved" in cold.log
    restored = fleet.start()
    assert "compile cache: restored" in restored.log
    assert restored.graphs == {"hit": 1, "miss": 0}
    assert verdict_of(restored) == "hit"
    order = [
        restored.log.index(words)
        for words in ("compile cache: restored", "b10_3fs: loaded", "The server is fired up", SAVED[1])
    ]
    assert order == sorted(order), "the restore comes before the model, the save after the warm-up"
    for start in (cold, restored):
        account = account_of(find_start("latest", start.home / ".cache" / "engine_loader" / "starts"))
        assert account.timeline.ready is not None
        assert account.coverage > 0.95
        assert {"server", "scheduler"} <= {process.role for process in account.timeline.processes}
        assert len(list(account.timeline.phases("weight reading"))) == 1


def test_what_is_compiled_after_a_restore_is_told_with_the_option_that_differs(fleet: Fleet) -> None:
    other = fleet.start("--chunked-prefill-size", "128", SGLANG_PROBE_COMPILES="gelu")
    assert other.graphs == {"hit": 0, "miss": 1}
    result, *reasons = verdict_of(other).split("; ")
    assert result in ("partial", "miss")
    # 0.5.9 compiles one of its own, too.
    assert any(re.fullmatch(r"1 graph of inductor compiled anew: the cache has \d others?", line) for line in reasons)
    (option,) = [reason for reason in reasons if "chunked_prefill_size" in reason]
    assert not [reason for reason in reasons if "RUN_ID" in reason], "each start has another one"
    assert option.startswith("server_args.chunked_prefill_size was ")
    assert option.endswith(" when this cache was made, is 128 now")


def test_switched_off_nothing_is_restored_or_saved(fleet: Fleet) -> None:
    packs = sorted(fleet.store.rglob("*"))
    off = fleet.start(save=False, ENGINE_LOADER_COMPILE_CACHE__ENABLED="false")
    assert off.graphs == {"hit": 0, "miss": 1}
    assert "compile cache:" not in off.log
    assert sorted(fleet.store.rglob("*")) == packs
