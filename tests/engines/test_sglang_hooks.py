"""The hooks of SGLang, on classes that have its shape: what waits for what, who saves, and that no fault gets out.

tests/engines/sglang/ has the same on the real processes.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine_loader.compile_cache.process.use import noted_uses
from engine_loader.engines.common import cache_hooks
from engine_loader.engines.sglang import cache as sglang_cache
from tests.engines.hooks import noted_jobs
from tests.support.waiting import wait_for

MODULES = {
    "engine": "sglang.srt.entrypoints.engine",
    "http_server": "sglang.srt.entrypoints.http_server",
    "scheduler": "sglang.srt.managers.scheduler",
}


def arguments(**changes: Any) -> SimpleNamespace:
    values = {"model_path": "/models/llama", "load_format": "auto", "tp_size": 1, "pp_size": 1, "dp_size": 1}
    return SimpleNamespace(**{**values, "nnodes": 1, "node_rank": 0, "base_gpu_id": 0, **changes})


class Sglang:
    """SGLang's modules, and what happened in them."""

    def __init__(self, events: list[str]) -> None:
        class Engine:
            def __init__(self, **values: Any) -> None:
                self.server_args = arguments(**values)
                self._launch_subprocesses(server_args=self.server_args)

            @classmethod
            def _launch_subprocesses(cls, server_args: Any) -> str:
                events.append("launch")
                return cls.__name__

        class Scheduler:
            gpu_id = 0
            tp_rank = 0
            dp_rank = None  # as it is without data parallelism

            def __init__(self, server_args: Any) -> None:
                self.server_args = server_args
                self.init_model_worker()

            def init_model_worker(self) -> None:
                events.append("model")

        def wait_and_warmup(server_args: Any, launch_callback: Any = None) -> None:
            events.append("warm-up")

        self.status = SimpleNamespace(name="Up")
        manager = SimpleNamespace(tokenizer_manager=SimpleNamespace(server_status=self.status))
        self.modules = {kind: ModuleType(name) for kind, name in MODULES.items()}
        vars(self.modules["engine"])["Engine"] = self.Engine = Engine
        vars(self.modules["scheduler"])["Scheduler"] = self.Scheduler = Scheduler
        vars(self.modules["http_server"]).update(_wait_and_warmup=wait_and_warmup, _global_state=manager)

    def warm_up(self, server_args: Any) -> None:
        vars(self.modules["http_server"])["_wait_and_warmup"](server_args)


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def sglang(events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sglang]:
    """The modules with the hooks on them; operations are only noted."""
    made = Sglang(events)
    for kind, name in MODULES.items():
        parent, _, last = name.rpartition(".")
        for package in ("sglang", "sglang.srt", parent):
            if not isinstance(sys.modules.get(package), ModuleType):
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setitem(sys.modules, name, made.modules[kind])
        monkeypatch.setattr(sys.modules[parent], last, made.modules[kind], raising=False)
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path / "sglang"))
    no_machine = {"environment_key": lambda engine, scope, devices: sglang_cache.CacheKey((), f"{scope}/{devices}")}
    for name, value in no_machine.items():
        monkeypatch.setattr(sglang_cache, name, value)
    with noted_jobs(events, tmp_path, monkeypatch):
        for _ in range(2):  # as often as a process likes
            sglang_cache.register_engine()
            sglang_cache.register_scheduler()
            sglang_cache.register_http_server()
        yield made


def kinds(events: list[str]) -> list[str]:
    return [event.partition(" ")[0] for event in events]


def test_a_server_restores_before_the_model_and_saves_behind_the_warm_up(sglang: Sglang, events: list[str]) -> None:
    given = arguments(tp_size=2, dp_size=2)
    assert sglang.Engine._launch_subprocesses(server_args=given) == "Engine"
    sglang.Scheduler(given)
    sglang.warm_up(given)
    wait_for(lambda: len(events) == 5)
    assert kinds(events) == ["launch", "restored", "model", "warm-up", "saved"]
    scope = events[1].partition(" ")[2]
    assert scope.startswith("llama_")
    assert scope.endswith("_tp2_pp1_dp2/4")
    assert events[4] == f"saved {scope}"


def test_each_rank_notes_that_it_ran_so_that_the_save_behind_it_tells_what_the_cache_was_good_for(
    sglang: Sglang, tmp_path: Path
) -> None:
    since_ns = time.time_ns()
    given = arguments(attention_backend="triton", api_key="hunter2")
    sglang.Engine._launch_subprocesses(given)
    for rank in range(2):
        sglang.Scheduler.tp_rank = rank
        sglang.Scheduler(given)
    uses = noted_uses(tmp_path / "sglang", since_ns - 50_000_000)
    assert [use.rank for use in uses] == ["rank_0_0_0", "rank_1_0_0"]
    assert all(use.factors["server_args"] == {"attention_backend": "triton"} for use in uses)


def test_a_warm_up_that_failed_saves_nothing(sglang: Sglang, events: list[str]) -> None:
    sglang.Engine._launch_subprocesses(arguments())
    sglang.status.name = "Starting"
    sglang.warm_up(arguments())
    time.sleep(0.5)
    assert "saved" not in kinds(events)


def test_an_engine_without_a_server_saves_when_it_is_made(sglang: Sglang, events: list[str]) -> None:
    sglang.Engine()
    wait_for(lambda: "saved" in kinds(events))


def test_a_server_of_several_processes_saves_when_its_schedulers_are_up(sglang: Sglang, events: list[str]) -> None:
    sglang.Engine._launch_subprocesses(arguments(tokenizer_worker_num=2))
    wait_for(lambda: "saved" in kinds(events))


def test_of_another_node_the_last_scheduler_saves_under_the_key_of_its_node(
    sglang: Sglang, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(nnodes=2, node_rank=1, tp_size=4)
    sglang.Engine._launch_subprocesses(given)
    wait_for(lambda: "restored" in kinds(events))
    (restored,) = (event for event in events if event.startswith("restored"))
    assert restored.endswith("/2")
    # A scheduler is bound to some of the node's processors, and would find another number of threads.
    monkeypatch.setattr(sglang_cache, "key_of", lambda *_: sglang_cache.CacheKey((), "of the scheduler's own"))
    monkeypatch.setattr(sglang.Scheduler, "tp_rank", 3)
    sglang.Scheduler(given)
    time.sleep(0.5)
    assert "saved" not in kinds(events), "the other one may be compiling yet"
    monkeypatch.setattr(sglang.Scheduler, "tp_rank", 2)
    sglang.Scheduler(given)
    sglang.Scheduler(given)
    wait_for(lambda: "saved" in kinds(events))
    time.sleep(0.5)
    assert [event for event in events if event.startswith("saved")] == [restored.replace("restored", "saved")]


def test_a_scheduler_that_something_else_started_does_all_by_itself(sglang: Sglang, events: list[str]) -> None:
    sglang.Scheduler(arguments())
    wait_for(lambda: len(events) == 3)
    assert kinds(events) == ["restored", "model", "saved"]


def test_switched_off_nothing_happens(sglang: Sglang, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__ENABLED", "false")
    sglang.Engine()
    sglang.Scheduler(arguments())
    sglang.warm_up(arguments())
    time.sleep(0.3)
    assert events == ["launch", "model", "warm-up"]


def test_a_hook_that_is_gone_is_told(sglang: Sglang, caplog: pytest.LogCaptureFixture) -> None:
    vars(sglang.modules["http_server"])["_wait_and_warmup"] = lambda server_args: None
    sglang.Engine._launch_subprocesses(arguments())
    assert "hook on sglang.srt.entrypoints.http_server._wait_and_warmup" in caplog.text
    assert "Scheduler.init_model_worker" not in caplog.text


@pytest.mark.parametrize("fault", ["settings", "key", "directories"])
def test_no_fault_of_ours_keeps_the_engine_from_starting(
    sglang: Sglang, events: list[str], fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("a fault of ours")

    if fault == "settings":
        monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__RESTORE_TIMEOUT_S", "soon")
    else:
        owner, name = {"key": (sglang_cache, "key_of"), "directories": (cache_hooks, "directories_of")}[fault]
        monkeypatch.setattr(owner, name, broken)
    sglang.Engine()
    sglang.Scheduler(arguments())
    sglang.warm_up(arguments())
    assert kinds(events) == ["launch", "model", "warm-up"]
    assert "ENGINE_LOADER_COMPILE_CACHE__ENABLED=false" in caplog.text


def test_the_cache_of_sglang_lies_where_sglang_has_it(tmp_path: Path) -> None:
    from engine_loader.compile_cache.directories import ENGINES, directories_of

    one = {name: str(tmp_path / name) for name in ("triton", "inductor")}
    newer = {
        "SGLANG_CACHE_DIR": str(tmp_path),
        "TRITON_CACHE_DIR": one["triton"],
        "TORCHINDUCTOR_CACHE_DIR": one["inductor"],
    }
    found = directories_of("sglang", newer)
    assert found["sglang"] == tmp_path
    assert not {"triton", "inductor"} & set(found), "they lie inside, and would be packed twice"
    assert directories_of("sglang", {})["deep_gemm"] == Path("~/.cache/deep_gemm").expanduser()
    root = ENGINES["sglang"][0]
    assert root.takes("inductor/fxgraph/ab/fabc/kernel")
    for path in ("ple/llama/table", "model_streamer/0a/config.json", "gpu_p2p_access_cache_for_0,1.json"):
        assert not root.takes(path)
