"""The hooks of vLLM, on classes that have its shape: what waits for what, and that nothing of ours gets out."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine_loader.compile_cache.directories import STATE
from engine_loader.compile_cache.packs.manifest import Manifest, PackedFile
from engine_loader.compile_cache.packs.pack import Pack
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.locks import NodeLock
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.trials import begin_trial
from engine_loader.compile_cache.stores.interface import Stored
from engine_loader.engines.common import cache_hooks, torch_fixups
from engine_loader.engines.vllm import cache as vllm_cache
from engine_loader.engines.vllm import fixups as vllm_fixups
from tests.engines.hooks import noted_jobs
from tests.support.waiting import GENEROUS_S, wait_for


def config(**parallel: Any) -> SimpleNamespace:
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "rank": 0} | parallel
    return SimpleNamespace(
        model_config=SimpleNamespace(model="/models/llama", revision=None),
        parallel_config=SimpleNamespace(**sizes, data_parallel_rank=0),
        compilation_config=SimpleNamespace(cache_dir="", local_cache_dir=""),
    )


class Engine:
    """vLLM's classes, and what happened in them."""

    def __init__(self, events: list[str], markers: Path) -> None:
        self.ends: type[BaseException] | None = None
        self.on_trial: list[int] = []
        outer = self

        class Executor:
            def __init__(self, vllm_config: Any) -> None:
                events.append("executor")

        class EngineCore:
            def __init__(self, vllm_config: Any) -> None:
                self.vllm_config = vllm_config
                self.model_executor = Executor(vllm_config)
                self.result = self._initialize_kv_caches(vllm_config)

            def _initialize_kv_caches(self, vllm_config: Any) -> str:
                events.append("compile")
                outer.on_trial.append(len(trials(markers)))
                if outer.ends is not None:
                    raise outer.ends
                return "what the engine returns"

        class Worker:
            local_rank = 0

            def determine_available_memory(self) -> int:
                events.append("memory")
                return 17

            def compile_or_warm_up_model(self) -> float:
                events.append("warm-up")
                return 1.5

        class WorkerWrapperBase:
            def __init__(self, vllm_config: Any) -> None:
                self.vllm_config = vllm_config
                self.worker = Worker()

            def init_device(self) -> None:
                """The worker is there already, as in vLLM."""

        class ElasticEPScalingState:
            def __init__(self, engine_core: Any) -> None:
                self.engine_core = engine_core

            def _collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> None:
                events.append(f"{method} {' '.join(args)}")

        self.Executor, self.EngineCore, self.WorkerWrapperBase = Executor, EngineCore, WorkerWrapperBase
        self.ElasticEPScalingState = ElasticEPScalingState


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def engine(events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The classes with the hooks on them; operations are only noted."""
    made = Engine(events, tmp_path / "vllm" / STATE)
    for name, attribute in (
        ("vllm.v1.executor.abstract", "Executor"),
        ("vllm.v1.engine.core", "EngineCore"),
        ("vllm.v1.worker.worker_base", "WorkerWrapperBase"),
        ("vllm.distributed.elastic_ep.elastic_state", "ElasticEPScalingState"),
    ):
        module = ModuleType(name)
        setattr(module, attribute, getattr(made, attribute))
        monkeypatch.setitem(sys.modules, name, module)
    packages = ("vllm", "vllm.v1", "vllm.v1.executor", "vllm.v1.engine", "vllm.v1.worker")
    for name in (*packages, "vllm.distributed", "vllm.distributed.elastic_ep"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    monkeypatch.setattr(vllm_cache, "environment_key", lambda engine, scope, devices: vllm_cache.CacheKey((), scope))
    with noted_jobs(events, tmp_path, monkeypatch):
        for _ in range(2):  # as often as a process likes
            vllm_cache.register_executor()
            vllm_cache.register_engine_core()
            vllm_cache.register_worker()
            vllm_cache.register_elastic()
        yield made


def scope_of(events: list[str]) -> str:
    (restored,) = [event for event in events if event.startswith("restored")]
    return restored.partition(" ")[2]


def test_the_restore_runs_beside_the_executor_and_is_joined_before_compilation(
    engine: Engine, events: list[str]
) -> None:
    core = engine.EngineCore(config())
    assert core.result == "what the engine returns"
    assert [event.partition(" ")[0] for event in events[:3]] == ["executor", "restored", "compile"]
    wait_for(lambda: len(events) == 4)
    assert events[3].startswith("saved llama_")
    assert scope_of(events).endswith("_tp1_pp1_dp1")


def test_a_follower_without_an_engine_process_waits_and_saves_itself_under_the_key_of_its_node(
    engine: Engine, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(node_rank_within_dp=1, tensor_parallel_size=2)
    engine.Executor(settings)
    # A worker is bound to some of the node's processors, and would find another number of threads.
    monkeypatch.setattr(vllm_cache, "key_of", lambda *_: vllm_cache.CacheKey((), "of the worker's own"))
    wrapper = engine.WorkerWrapperBase(settings)
    wrapper.init_device()
    assert wrapper.worker.determine_available_memory() == 17
    assert wrapper.worker.compile_or_warm_up_model() == 1.5
    assert [event.partition(" ")[0] for event in events[:4]] == ["executor", "restored", "memory", "warm-up"]
    wait_for(lambda: f"saved {scope_of(events)}" in events)


def test_of_a_followers_workers_the_last_one_saves_once(engine: Engine, events: list[str]) -> None:
    """Also where a device is initialised again."""
    engine.Executor(config(node_rank_within_dp=1, tensor_parallel_size=4, local_world_size=2))
    wrappers = []
    for rank in (3, 2):
        settings = config(node_rank_within_dp=1, tensor_parallel_size=4, local_world_size=2, rank=rank)
        wrappers.append(engine.WorkerWrapperBase(settings))
        wrappers[-1].init_device()
        wrappers[-1].init_device()
    wrappers[0].worker.compile_or_warm_up_model()
    time.sleep(0.5)
    assert not any(event.startswith("saved") for event in events), "the other one may be compiling yet"
    wrappers[1].worker.compile_or_warm_up_model()
    wrappers[0].worker.compile_or_warm_up_model()
    wait_for(lambda: any(event.startswith("saved") for event in events))
    time.sleep(0.5)
    assert [event for event in events if event.startswith(("warm-up", "saved"))] == [
        "warm-up",
        "warm-up",
        "warm-up",
        f"saved {scope_of(events)}",
    ]


def test_a_worker_on_a_node_of_its_own_restores_and_saves(engine: Engine, events: list[str]) -> None:
    """As Ray starts it: without the variables of the engine's process."""
    wrapper = engine.WorkerWrapperBase(config())
    wrapper.init_device()
    wrapper.worker.determine_available_memory()
    wrapper.worker.compile_or_warm_up_model()
    assert [event.partition(" ")[0] for event in events[:3]] == ["restored", "memory", "warm-up"]
    wait_for(lambda: any(event.startswith("saved") for event in events))


@pytest.mark.parametrize("other", ["machine", "container"])
def test_a_worker_with_the_variables_of_another_nodes_engine_restores_and_saves(
    engine: Engine, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """As Ray's executor starts it: with all variables of the engine's process."""
    engine.Executor(config())
    wait_for(lambda: len(events) == 2)
    events.clear()
    if other == "machine":
        monkeypatch.setattr("socket.gethostname", lambda: "another-machine")
    else:
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "elsewhere"))
    wrapper = engine.WorkerWrapperBase(config())
    wrapper.init_device()
    wrapper.worker.determine_available_memory()
    wrapper.worker.compile_or_warm_up_model()
    assert [event.partition(" ")[0] for event in events[:3]] == ["restored", "memory", "warm-up"]
    wait_for(lambda: any(event.startswith("saved") for event in events))


@pytest.mark.parametrize("layout", [{}, {"node_rank": 1, "node_rank_within_dp": 0, "data_parallel_size": 2}])
def test_the_workers_of_an_engine_process_leave_the_save_to_it(
    engine: Engine, events: list[str], layout: dict[str, int]
) -> None:
    engine.Executor(config(**layout))
    wrapper = engine.WorkerWrapperBase(config(**layout))
    wrapper.init_device()
    wrapper.worker.determine_available_memory()
    wrapper.worker.compile_or_warm_up_model()
    time.sleep(0.5)
    assert not any(event.startswith("saved") for event in events)


@pytest.mark.parametrize("warm_up", ["warmup_new_worker", "warmup_local_kernels"])  # the second up to vLLM 0.29
def test_an_engine_that_joins_another_saves_after_its_own_warm_up(
    engine: Engine, events: list[str], monkeypatch: pytest.MonkeyPatch, warm_up: str
) -> None:
    monkeypatch.setenv("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", "1")
    scaling = engine.ElasticEPScalingState(engine.EngineCore(config()))
    scaling._collective_rpc("elastic_ep_execute", args=("prepare_new_worker",))
    time.sleep(0.5)
    assert not any(event.startswith("saved") for event in events)
    scaling._collective_rpc("elastic_ep_execute", args=(warm_up,))
    wait_for(lambda: events[-1].startswith("saved"))
    assert events[-2] == f"elastic_ep_execute {warm_up}"


def test_an_engine_that_others_join_saves_once(engine: Engine, events: list[str]) -> None:
    scaling = engine.ElasticEPScalingState(engine.EngineCore(config()))
    scaling._collective_rpc("elastic_ep_execute", args=("warmup_new_worker",))
    wait_for(lambda: any(event.startswith("saved") for event in events))
    time.sleep(0.5)
    assert len([event for event in events if event.startswith("saved")]) == 1


def test_an_engine_that_is_captured_has_saved_when_it_is_ready(
    engine: Engine, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="vllm.snapshot.server"))
    monkeypatch.setenv(cache_hooks._SAVES_IN_FOREGROUND, "")  # so that it is taken back
    vllm_cache.register_executor()
    engine.EngineCore(config())
    assert events[-1].startswith("saved")


def test_two_engines_on_one_cache_restore_one_after_another(engine: Engine, events: list[str], tmp_path: Path) -> None:
    cores: list[Any] = []
    threads = [threading.Thread(target=lambda: cores.append(engine.EngineCore(config()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GENEROUS_S)
    assert len(cores) == 2
    restored = [index for index, event in enumerate(events) if event.startswith("restored")]
    compiled = [index for index, event in enumerate(events) if event == "compile"]
    assert len(restored) == 2
    assert restored[0] < compiled[0]


def test_a_worker_does_not_wait_for_a_lock_that_nobody_gives_back(
    engine: Engine, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__RESTORE_TIMEOUT_S", "0.1")
    monkeypatch.setattr(cache_hooks, "_SLACK_S", 0.1)
    engine.Executor(config())  # begins the restore, as the process above does
    wait_for(lambda: len(events) == 2)
    lock = NodeLock(tmp_path / "vllm", cache_hooks.RESTORE_LOCK)
    assert lock.acquire(0)
    wrapper = engine.WorkerWrapperBase(config())
    wrapper.init_device()
    assert wrapper.worker.determine_available_memory() == 17
    lock.release()


@pytest.fixture
def markers(tmp_path: Path, engine: Engine, events: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the markers of trials are; a restore brings a file."""

    def run_job(job: Job, timeout_s: float) -> Outcome:
        if job.action == "restore":
            pack = Pack(Stored("key/scope/pack", 1, 1.0), Manifest(job.key, 1.0, (), ()))
            trial = begin_trial(job.home(), job.key.prefix, job.engine_pid, job.since_ns)
            trial.add([(pack, PackedFile("vllm/x", 1, 1, 0o644, "0" * 64, 0, 0))])
        events.append(f"{job.action}d {job.key.scope}")
        return Outcome("restored" if job.action == "restore" else "saved", files=1)

    monkeypatch.setattr("engine_loader.compile_cache.process.session.run_job", run_job)
    return tmp_path / "vllm" / STATE


def trials(markers: Path) -> list[str]:
    return [path.name for path in markers.glob("trial-*")]


def test_what_is_restored_is_on_trial_until_the_engine_is_ready(
    engine: Engine, events: list[str], markers: Path
) -> None:
    core = engine.EngineCore(config())
    assert core.result == "what the engine returns"
    assert engine.on_trial == [2]  # the marker and the lock, while it compiled
    assert trials(markers) == []


@pytest.mark.parametrize(
    ("ends", "left"), [(RuntimeError, 2), (ImportError, 2), (SystemExit, 0), (KeyboardInterrupt, 0)]
)
def test_an_engine_that_ends_before_it_is_ready_saves_nothing_and_its_trial_stays_unless_it_was_told_to_stop(
    engine: Engine, events: list[str], markers: Path, ends: type[BaseException], left: int
) -> None:
    engine.ends = ends
    with pytest.raises(ends):
        engine.EngineCore(config())
    time.sleep(0.3)
    assert sorted(event.partition(" ")[0] for event in events) == ["compile", "executor", "restored"]
    assert len(trials(markers)) == left


def test_a_follower_ends_the_trial_of_its_node(engine: Engine, events: list[str], markers: Path) -> None:
    settings = config(node_rank_within_dp=1, tensor_parallel_size=2)
    engine.Executor(settings)
    wrapper = engine.WorkerWrapperBase(settings)
    wrapper.init_device()
    wrapper.worker.determine_available_memory()
    assert len(trials(markers)) == 2
    wrapper.worker.compile_or_warm_up_model()
    assert trials(markers) == []


def test_switched_off_nothing_happens(engine: Engine, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__ENABLED", "false")
    engine.EngineCore(config())
    wrapper = engine.WorkerWrapperBase(config())
    wrapper.init_device()
    wrapper.worker.determine_available_memory()
    assert events == ["executor", "compile", "memory"]


@pytest.mark.parametrize("fault", ["settings", "key", "directories", "lock"])
def test_no_fault_of_ours_keeps_the_engine_from_starting(
    engine: Engine,
    events: list[str],
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("a fault of ours")

    if fault == "settings":
        monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__RESTORE_TIMEOUT_S", "soon")
    elif fault == "lock":
        (tmp_path / "vllm").write_text("a file where a directory is meant")
    else:
        owner, name = {"key": (vllm_cache, "key_of"), "directories": (cache_hooks, "directories_of")}[fault]
        monkeypatch.setattr(owner, name, broken)
    assert engine.EngineCore(config()).result == "what the engine returns"
    wrapper = engine.WorkerWrapperBase(config())
    wrapper.init_device()
    assert wrapper.worker.determine_available_memory() == 17
    assert wrapper.worker.compile_or_warm_up_model() == 1.5
    assert [event for event in events if " " not in event] == ["executor", "compile", "memory", "warm-up"]
    assert "ENGINE_LOADER_COMPILE_CACHE__ENABLED=false" in caplog.text


def test_registering_fix_ups_twice_applies_them_once() -> None:
    def load(*_args: Any) -> Any:
        return decorators.torch.compiler.load_compiled_function()._artifacts.compiled_fn.finalize_loading(None)

    def plain() -> int:
        return 1

    loaded = SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=plain))
    compiler = SimpleNamespace(load_compiled_function=lambda: loaded)
    decorators = SimpleNamespace(torch=SimpleNamespace(compiler=compiler), _try_load_aot_compiled_fn=load)
    before = compiler.load_compiled_function
    (fixup,) = vllm_fixups.FIXUPS
    fixup.apply(decorators)
    once = decorators._try_load_aot_compiled_fn
    fixup.apply(decorators)
    assert decorators._try_load_aot_compiled_fn is once
    assert once() is None
    assert compiler.load_compiled_function is before


def test_the_patch_files_make_the_same_changes() -> None:
    patches = Path(__file__).parents[2] / "patches"
    for fixup in (*vllm_fixups.FIXUPS, *torch_fixups.FIXUPS):
        text = (patches / fixup.patch).read_text()
        path = fixup.module.replace(".", "/") + ".py"
        assert f"--- a/{path}\n" in text
        assert fixup.upstream.splitlines()[0].strip() in text


def test_a_header_is_made_only_for_what_is_to_be_compiled(tmp_path: Path) -> None:
    made: list[str] = []

    def write(name: str) -> tuple[str, str]:
        (tmp_path / name).touch()
        return name, str(tmp_path / name)

    def precompile(header: str) -> str:
        made.append(header)
        return f"/headers/{header}"

    codecache = SimpleNamespace(write=write, _precompile_header=precompile)
    for _ in range(2):
        torch_fixups.FIXUPS[0].apply(codecache)
    codecache.write("a.main.cpp")
    assert codecache._precompile_header("x.h") == "/headers/x.h"
    (tmp_path / "a.main.so").touch()
    codecache.write("a.main.cpp")
    assert codecache._precompile_header("x.h") == ""
    codecache.write("b.optimized.cpp")
    assert codecache._precompile_header("y.h") == "/headers/y.h"
    assert made == ["x.h", "y.h"]
