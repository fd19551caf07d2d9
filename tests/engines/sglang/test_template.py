"""`start.template: on` with SGLang: what is forked is as what is spawned, and answers the same."""

import os
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import VERSION
from tests.engines.sglang.serving import FORMAT, PROMPT, Served, digests, running
from tests.engines.starting.test_vllm_template import differences
from tests.support.process_state import audited, read
from tests.support.sglang_server import PROBE, TWO_RANKS, WITHOUT_PLUGINS
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

TEMPLATE = "ENGINE_LOADER_START__TEMPLATE"
SAME = ("daemon", "directory", "cpus", "nice", "limits", "signals", "blocked", "threads", "torch_threads", "stdin")
OF_EACH_START = {
    *("PROCESS_STATE_DIRECTORY", "PYTHONPATH", TEMPLATE, "SGLANG_PROBE", "SGLANG_RUN_ID"),
    *("_ENGINE_LOADER_START", "ENGINE_LOADER_REPORT__DIRECTORY"),
}


@pytest.mark.skipif(VERSION in WITHOUT_PLUGINS, reason="the template needs SGLang's plugins")
def test_forked_processes_have_the_state_of_spawned_ones_and_answer_the_same(
    llama: Path, expected: Served, tmp_path: Path
) -> None:
    states = {}
    for way in ("off", "on"):
        (tmp_path / way).mkdir()
        env = audited(tmp_path / way)
        env["PYTHONPATH"] = os.pathsep.join([str(PROBE), env["PYTHONPATH"]])
        with running(VERSION, llama, tmp_path / way / "probe", *FORMAT, env={**env, TEMPLATE: way}) as server:
            assert server.complete(PROMPT, max_tokens=24) == expected.text
            states[way] = read(tmp_path / way)
            templates = [pid for pid in server.processes if name_of(pid) == "engine_loader_t"]
        assert "start.template" not in server.log, "nothing was spawned that could be forked"
        assert len(templates) == (way == "on")
        assert digests(tmp_path / way / "probe") == expected.parameters
    spawned, forked = states["off"], states["on"]
    assert set(spawned) == set(forked) == {"MainProcess", "Process-1", "Process-2"}
    for name in ("Process-1", "Process-2"):
        one, other = spawned[name], forked[name]
        assert len(other["modules"]) > len(one["modules"])
        assert {key: other[key] for key in SAME} == {key: one[key] for key in SAME}
        assert differences(one["modules"], other["modules"]) == []
        changed = {
            key for key in {*one["environ"], *other["environ"]} if one["environ"].get(key) != other["environ"].get(key)
        }
        assert changed <= OF_EACH_START
        assert other["ppid"] == forked["MainProcess"]["pid"] == other["parent"][1]


@pytest.mark.skipif(VERSION in WITHOUT_PLUGINS, reason="the template needs SGLang's plugins")
def test_two_ranks_are_forked_and_end_with_the_server(llama: Path, expected: Served, tmp_path: Path) -> None:
    env = {**TWO_RANKS, TEMPLATE: "on"}
    with running(VERSION, llama, tmp_path, *FORMAT, "--tp-size", "2", env=env) as server:
        assert server.complete(PROMPT, max_tokens=24) == expected.text
        processes = server.processes
    assert "start.template" not in server.log
    wait_for(lambda: not [pid for pid in processes if Path(f"/proc/{pid}").exists()])


@pytest.mark.skipif(VERSION in WITHOUT_PLUGINS, reason="the template needs SGLang's plugins")
def test_a_variable_that_imports_may_have_read_is_a_reason_to_spawn(
    llama: Path, expected: Served, tmp_path: Path
) -> None:
    """The first process's own change, by a plugin that is loaded behind this one."""
    package = tmp_path / "package"
    info = package / "late-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nzz_late = late:change\n")
    (package / "late.py").write_text("import os\ndef change():\n    os.environ['COLOUR'] = 'green'\n")
    env = {TEMPLATE: "on", "PYTHONPATH": os.pathsep.join([str(PROBE), str(package)])}
    with running(VERSION, llama, tmp_path / "probe", *FORMAT, env=env) as server:
        assert server.complete(PROMPT, max_tokens=24) == expected.text
        templates = [pid for pid in server.processes if name_of(pid) == "engine_loader_t"]
    assert "is spawned, not forked: what was imported may have read COLOUR before it was changed" in server.log
    assert len(templates) == 1, "a spawned process has made a template of its own"


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()
