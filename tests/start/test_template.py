"""Processes that a template forks are what spawned ones would be: parent, surroundings, pipes, exit statuses, ends."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, logging, multiprocessing, os, resource, signal, sys, threading, time
from multiprocessing.connection import wait
from engine_loader.start import fitness, spawned

def state():
    return {
        "pid": os.getpid(), "ppid": os.getppid(), "argv": sys.argv,
        "parent": multiprocessing.parent_process().pid, "cwd": os.getcwd(),
        "name": multiprocessing.current_process().name, "colour": os.environ.get("COLOUR"),
        "shape": os.environ.get("SHAPE"),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "cpus": len(os.sched_getaffinity(0)),
        "umask": spawned.Surroundings().umask, "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "comm": open("/proc/self/comm").read().strip(), "stdin": os.readlink("/proc/self/fd/0"),
    }

def idle():
    # In steps: a signal that comes just before a sleep begins does not end it.
    while True:
        time.sleep(0.05)

def worker(connection, lock, end):
    import atexit
    atexit.register(print, "worker's exit", flush=True)
    with lock:
        connection.send(state())
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "raises":
        raise ValueError("a worker that fails")
    if end == "waits":
        idle()
    if end == "linked":
        wait([multiprocessing.parent_process().sentinel])
    sys.exit({"seven": 7}.get(end, 0))

def engine(connection, ends):
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    states, codes, kinds = [], [], []
    os.environ["COLOUR"] = "green"
    for end in ends:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(writer, lock, end), name="Worker-" + end, daemon=True)
        process.start()
        writer.close()
        states.append(reader.recv())
        if end in ("waits", "linked"):
            continue
        wait([process.sentinel])
        process.join()
        codes.append(process.exitcode)
        kinds.append(type(process._popen).__name__)
    connection.send((state(), states, codes, kinds))
    if "waits" in ends:
        idle()
    if "linked" in ends:
        wait([multiprocessing.parent_process().sentinel])

def role(process):
    return {"engine": spawned.Role(True), "worker": spawned.Role(False)}.get(process._target.__name__)

def plan(**changes):
    chosen = dict(role_of=role, why_not=lambda before, now: None, imports=("colorsys", "no_such_module"),
                  mend=lambda before: None, log=logging.getLogger("start"))
    return spawned.Plan(**{**chosen, **changes})

def start(ends, **options):
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=engine, args=(writer, ends), name="Engine", **options)
    process.start()
    writer.close()
    return process, reader

def say(**things):
    print(json.dumps(things), flush=True)
"""


def begin(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """A fresh interpreter that runs PROGRAM and then, as its main module, ``body``."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "\nif __name__ == '__main__':\n" + textwrap.indent(textwrap.dedent(body), "    "))
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, str(program), "an-argument"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        start_new_session=True,
    )


def run(tmp_path: Path, body: str) -> tuple[dict[str, Any], str]:
    """What it says, and its log."""
    process = begin(tmp_path, "logging.basicConfig(level=logging.INFO)\n" + textwrap.dedent(body))
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    said: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith("{"):
            said |= json.loads(line)
    return said, err + out


def first_said(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it says first."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise AssertionError(f"it said nothing: {process.communicate()[1]}")


def session(pid: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(name))
    return found


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while session(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session(pid) == []


SPAWNED_OR_FORKED = """
    os.environ["COLOUR"] = "red"
    os.environ["SHAPE"] = "square"
    if {forked}:
        reason = spawned.begin(plan())
        assert reason is None, reason
    os.environ.pop("SHAPE")
    os.umask(0o027)
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_NOFILE, (333, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    process, reader = start(["zero", "seven", "killed", "raises"])
    engine, workers, codes, kinds = reader.recv()
    process.join()
    say(me=os.getpid(), pid=process.pid, code=process.exitcode)
    say(engine=engine, workers=workers, codes=codes, kinds=kinds)
    spawned.end()
"""


def test_a_forked_process_is_what_a_spawned_one_would_be(tmp_path: Path) -> None:
    expected, _ = run(tmp_path, SPAWNED_OR_FORKED.format(forked=False))
    found, log = run(tmp_path, SPAWNED_OR_FORKED.format(forked=True))
    for said in (expected, found):
        for state in (said["engine"], *said["workers"]):
            del state["pid"]
            assert state["ppid"] == state.pop("parent"), "each is the child of the process that asked for it"
            state["ppid"] = {said["me"]: "first", said["pid"]: "engine"}[state["ppid"]]
    assert found["engine"] == expected["engine"]
    assert found["workers"] == expected["workers"]
    assert found["workers"][0]["colour"] == "green"
    assert found["codes"] == expected["codes"] == [0, 7, -signal.SIGKILL, 1]
    assert (expected["kinds"], found["kinds"]) == (["Popen"] * 4, ["_Forked"] * 4)
    assert found["code"] == 0
    assert "ValueError: a worker that fails" in log
    assert log.count("worker's exit") == 3, "functions for the exit are called, but not of the one that was killed"


def test_no_process_of_a_start_that_is_killed_stays(tmp_path: Path) -> None:
    body = """
        assert spawned.begin(plan()) is None
        process, reader = start(["zero", "waits"])
        say(pid=process.pid, worker=reader.recv()[1][1]["pid"])
        idle()
    """
    process = begin(tmp_path, body)
    said = first_said(process)
    assert len(session(process.pid)) >= 5, "the first process, its template, the engine, its template, a worker"
    os.kill(said["pid"], signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # A worker of vLLM's waits for the end of its engine by a pipe; this one sleeps.
    os.kill(said["worker"], signal.SIGKILL)
    wait_until_gone(process.pid)


def test_ctrl_c_reaches_the_children_and_the_template_outlives_it(tmp_path: Path) -> None:
    body = """
        assert spawned.begin(plan()) is None
        process, reader = start(["waits"])
        reader.recv()
        try:
            say(ready=True)
            idle()
        except KeyboardInterrupt:
            process.join()
            say(code=process.exitcode)
            again, reader = start(["zero"])
            say(kind=type(again._popen).__name__, codes=reader.recv()[2])
            again.join()
            spawned.end()
    """
    process = begin(tmp_path, body)
    first_said(process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    said = {key: value for line in out.splitlines() if line[:1] == "{" for key, value in json.loads(line).items()}
    assert said == {"code": 1, "kind": "_Forked", "codes": [0]}, err
    assert "KeyboardInterrupt" in err
    wait_until_gone(process.pid)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("assert spawned.begin(plan(why_not=lambda a, b: 'the sky is grey')) is None", "the sky is grey"),
        (
            "assert spawned.begin(plan()) is None\nos.kill(spawned._Current.template.pid, signal.SIGKILL)",
            "the template does not answer",
        ),
        (
            "from engine_loader.start import template\ntemplate.IDLE_S = 0.1\nassert spawned.begin(plan()) is None\n"
            "os.waitpid(spawned._Current.template.pid, 0)",
            "the template does not answer",
        ),
        (
            "assert spawned.begin(plan(imports=('threaded',))) is None",
            "the process has 2 threads (",
        ),
        (
            "import multiprocessing.spawn\nassert spawned.begin(plan()) is None\n"
            "multiprocessing.spawn.set_executable(sys.executable.replace('bin/', 'bin/../bin/'))",
            "processes are to be started by ",
        ),
    ],
    ids=[
        "the engine's reason",
        "a template that was killed",
        "a template that ended by itself",
        "a thread in the template",
        "another executable",
    ],
)
def test_what_is_not_forked_is_spawned_and_the_log_says_why(before: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    body = f"{before}\n" + textwrap.dedent(
        """
        process, reader = start(["seven"])
        said = reader.recv()
        process.join()
        say(kind=type(process._popen).__name__, codes=said[2], code=process.exitcode)
        spawned.end()
        """
    )
    said, log = run(tmp_path, body)
    assert said == {"kind": "Popen", "codes": [7], "code": 0}
    (line,) = [line for line in log.splitlines() if "start.template: Engine is spawned" in line]
    assert reason in line


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("threading.Thread(target=time.sleep, args=(1,), name='other').start()", "the process has 2 threads"),
        ("import socket\nkept = socket.socket()", "socket:["),
        ("import select\nkept = select.epoll()", "anon_inode:[eventpoll] is open"),
        (
            "import types\nsys.modules['torch.cuda'] = types.SimpleNamespace(is_initialized=lambda: True)",
            "CUDA or HIP is initialised",
        ),
    ],
)
def test_a_process_that_is_not_clean_makes_no_template(before: str, reason: str, tmp_path: Path) -> None:
    said, _ = run(tmp_path, f"{before}\nsay(reason=spawned.begin(plan()))")
    assert reason in said["reason"]


def test_threads_that_end_at_a_fork_do_not_count(tmp_path: Path) -> None:
    """numpy's OpenBLAS stops its threads when the process forks, and begins new ones when they are needed."""
    body = """
        import numpy
        numpy.ones((300, 300)) @ numpy.ones((300, 300))
        say(reason=spawned.begin(plan()))
        process, reader = start(["zero"])
        say(codes=reader.recv()[2])
        process.join()
        spawned.end()
    """
    said, _ = run(tmp_path, body)
    assert said == {"reason": None, "codes": [0]}


ROUNDS = 200 if os.environ.get("EXTENDED_TESTS") else 4
LINKED = """
    assert spawned.begin(plan()) is None
    process, reader = start(["linked", "linked"])
    try:
        engine, workers, _, _ = reader.recv()
        say(ready=[worker["colour"] for worker in workers])
    except EOFError:
        say(ended=True)
    process.join()
    say(code=process.exitcode)
"""


@pytest.mark.timeout(60 * ROUNDS)
def test_starts_in_a_row_of_which_a_process_is_killed_leave_none_and_do_not_hang(tmp_path: Path) -> None:
    """Any of them, at any moment: the first process, a template, one in between two forks, the engine, a worker."""
    chance = random.Random(20)
    said_ready = 0
    for number in range(ROUNDS):
        process = begin(tmp_path, LINKED)
        try:
            time.sleep(chance.uniform(0.0, 1.5))
            if number % 4:
                with suppress(OSError):
                    os.kill(chance.choice(session(process.pid) or [process.pid]), signal.SIGKILL)
            assert process.stdout is not None
            # Ends of the file, when the first process was killed, are as good as an answer.
            line = next((line for line in process.stdout if line.startswith("{")), "{}")
            said = json.loads(line)
            assert said in ({"ready": ["green", "green"]}, {"ended": True}, {})
            said_ready += "ready" in said
        finally:
            process.kill()
            process.wait()
            wait_until_gone(process.pid)
            process.communicate()
    assert said_ready >= ROUNDS // 4, "those of which no process was killed"
