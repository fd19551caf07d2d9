"""`vllm serve` whose engine and workers are forked from its template: what they are, beside spawned ones.

The starts, and many in a row without vLLM: make test-starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine_loader.engines.starting import vllm_processes
from tests.support.process_state import audited, read
from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

PROMPT = "the quick brown fox"
TEMPLATE = "ENGINE_LOADER_START__TEMPLATE"

OF_THE_PROCESS = {
    ("multiprocessing.spawn", "old_main_modules"): "a forked process has no second main module",
    ("numpy._core._type_aliases", "_abstract_type_name"): "what a loop over a set left",
    ("torch.distributed._composable.contract", "REGISTRY_KEY"): "a random name",
    ("torch.distributed._composable.contract", "STATE_KEY"): "a random name",
    ("torch.jit._builtins", "_builtin_table"): "addresses",
    ("torch._dynamo.variables.builder", "ITERTOOLS_POLYFILLED_TYPE_IDS"): "addresses",
    ("torch._dynamo.variables.builder", "ITERTOOLS_TYPE_IDS"): "addresses",
    ("transformers.models.auto.tokenization_auto", "model_type"): "what a loop over a set left",
    ("transformers.modeling_flash_attention_utils", "PACKAGE_DISTRIBUTION_MAPPING"): "as in the first process, where "
    "nothing had put setuptools/_vendor on sys.path yet",
    ("transformers.utils.import_utils", "PACKAGE_DISTRIBUTION_MAPPING"): "the same",
    ("transformers.utils.hub", "SESSION_ID"): "random; the user agent of requests to the hub",
    ("numpy.f2py.rules", "generationtime"): "the time",
    ("numpy.f2py.rules", "module_rules"): "the time",
    ("sglang.srt.observability.req_time_stats", "global_diff_realtime_monotonic"): "the time",
    ("vllm.logger", "_vllm_process_info"): "name and id of the process",
    ("vllm.platforms", "_init_trace"): "where the platform was first asked for",
}
"""(module, name) that differ from process to process, and why that is no matter."""
BY_IMPORTS = {
    ("sglang.srt.compilation.compilation_config", "SPLIT_OPS"): "operators",
    ("huggingface_hub.constants", "HF_XET_HIGH_PERFORMANCE"): "vLLM's weight_utils sets it when it is imported",
    ("torch._library.triton", "triton_ops_to_kernels"): "operators",
    ("torch.library", "_impls"): "operators",
    ("torch.ops", "_dir"): "operators",
}
"""Those that tell which modules have been imported: a forked process has some that a spawned one imports later."""


def server(model: Path, directory: Path, template: str) -> VllmServer:
    directory.mkdir()
    return VllmServer(
        model, "--load-format", "b10_3fs", env={**audited(directory), TEMPLATE: template}, start_timeout_s=600
    )


def differences(spawned: dict[str, Any], forked: dict[str, Any]) -> list[str]:
    """Values of modules that both processes have."""
    found = []
    for module in sorted(set(spawned) & set(forked)):
        if module == "torch._C._dynamo.guards":  # addresses of functions in C++
            continue
        for name in sorted(set(spawned[module]) & set(forked[module])):
            if spawned[module][name] != forked[module][name] and (module, name) not in {*OF_THE_PROCESS, *BY_IMPORTS}:
                found.append(f"{module}.{name}: {spawned[module][name][:200]} | {forked[module][name][:200]}")
    return found


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif("EXTENDED_TESTS" not in os.environ, reason="two starts of vLLM: make test-starts")
@pytest.mark.timeout(1800)
def test_forked_processes_of_vllm_have_the_state_of_spawned_ones_and_answer_the_same(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "llama", shards=2)
    answers, states, logs = {}, {}, {}
    for way in ("off", "auto"):
        running = server(model, tmp_path / way, way)
        with running:
            answers[way] = running.complete(PROMPT, max_tokens=24)
            states[way] = read(tmp_path / way)
        logs[way] = running.log
    assert answers["auto"] == answers["off"]
    assert answers["off"].strip()
    assert "start.template" not in logs["auto"], "nothing was spawned that could be forked"
    spawned, forked = states["off"], states["auto"]
    assert set(spawned) == set(forked) == {"MainProcess", "EngineCore", "VllmWorker-0"}
    for name in ("EngineCore", "VllmWorker-0"):
        one, other = spawned[name], forked[name]
        assert "popen_spawn" not in str(sorted(other["modules"])), f"{name} was forked"
        assert len(other["modules"]) > len(one["modules"])
        same = (
            "daemon",
            "directory",
            "cpus",
            "nice",
            "limits",
            "signals",
            "blocked",
            "threads",
            "torch_threads",
            "level",
        )
        assert {key: other[key] for key in same} == {key: one[key] for key in same}
        assert other["stdin"] == one["stdin"]
        assert differences(one["modules"], other["modules"]) == []
        passing = {"PROCESS_STATE_DIRECTORY", "PYTHONPATH", "LD_LIBRARY_PATH", TEMPLATE, "OLDPWD", "PWD", "_"}
        assert {
            key
            for key in {*one["environ"], *other["environ"]} - passing
            if one["environ"].get(key) != other["environ"].get(key)
        } <= {"VLLM_PORT", "_ENGINE_LOADER_START", "ENGINE_LOADER_REPORT__DIRECTORY"}  # each start has its own
    for state in (spawned, forked):
        assert state["EngineCore"]["ppid"] == state["MainProcess"]["pid"] == state["EngineCore"]["parent"][1]
        assert state["VllmWorker-0"]["ppid"] == state["EngineCore"]["pid"] == state["VllmWorker-0"]["parent"][1]


BEFORE = {"OMP_NUM_THREADS": "2", "COLOUR": "red"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": "1"}, None),
        ({"_ENGINE_LOADER_CACHE_STARTED": "{}", "TORCHINDUCTOR_CACHE_DIR": "/caches/inductor"}, None),
        ({"GOMP_CPU_AFFINITY": "0 1"}, "libgomp binds its threads when it is loaded (GOMP_CPU_AFFINITY=0 1)"),
        ({"COLOUR": "green", "ZZ": "1"}, "what was imported may have read COLOUR, ZZ before it was changed"),
        ({"LD_PRELOAD": "/lib/libtcmalloc.so.4"}, "LD_PRELOAD names /lib/libtcmalloc.so.4"),
        (
            {"LD_PRELOAD": "/nowhere/libgomp.so.1"},
            "LD_PRELOAD names /nowhere/libgomp.so.1, and GOMP_parallel is not that library's here",
        ),
    ],
)
def test_variables_that_were_changed_since_the_imports_are_a_reason(
    changes: dict[str, str], reason: str | None
) -> None:
    assert vllm_processes.why_not(BEFORE, {**BEFORE, **changes}) == reason


CONFIGURATION = """
import json, os, sys
late = sys.argv[1] == "late"
variables = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
if not late:
    os.environ |= variables
import torch._inductor.config as config
if late:
    from engine_loader.engines.starting.torch_state import mend_inductor
    os.environ |= variables
    mend_inductor()
plain = (bool, int, float, str, list, tuple, dict, type(None))
values = {name: repr(value) for name, value in config.get_config_copy().items() if isinstance(value, plain)}
print(json.dumps(values, sort_keys=True))
"""


@pytest.mark.slow
def test_inductor_is_configured_as_if_it_had_been_imported_with_the_childs_variables() -> None:
    """All of it: inductor's cache takes its configuration into its keys."""
    found = {}
    for when in ("early", "late"):
        command = [sys.executable, "-c", CONFIGURATION, when]
        found[when] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(found["early"]) > 100
    assert found["early"]["compile_threads"] == "1"
    assert found["early"]["cpp.dynamic_threads"] == "True"
    assert found["late"] == found["early"]


def test_a_program_that_is_not_vllm_serve_makes_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(vllm_processes, "begin", made.append)
    vllm_processes.register()
    assert made == []


@pytest.mark.parametrize(("setting", "made"), [("auto", 0), ("on", 1), ("off", 0)])
def test_beside_an_accelerator_there_is_a_template_only_where_it_is_asked_for(
    setting: str, made: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plans: list[object] = []
    monkeypatch.setenv(TEMPLATE, setting)
    monkeypatch.setattr(vllm_processes, "begin", plans.append)
    monkeypatch.setattr(vllm_processes, "_is_first_process", lambda: True)
    monkeypatch.setattr(vllm_processes, "_platform", lambda: "cuda")
    with caplog.at_level("INFO", vllm_processes.logger.name):
        vllm_processes.register()
    assert len(plans) == made
    reason = "it has not been tested on cuda: start.template: on has it anyway"
    said = [record.getMessage() for record in caplog.records]
    assert said == ([f"start.template: processes of this start are spawned: {reason}"] if setting == "auto" else [])
