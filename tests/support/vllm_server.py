"""Starts the real `vllm serve` on CPU, asks it for completions, and sees to it that nothing of it is left.

with VllmServer(model_dir, "--load-format", "b10_3fs") as server:
    text = server.complete("Once upon a time", max_tokens=8)
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .loopback_server import free_port
from .mappings import mapped_of_shared_memory

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
STARTING_STOP_TIMEOUT_S = 2.0  # vLLM heeds no SIGTERM while its engine starts
REQUEST_TIMEOUT_S = 60.0
LOG_TAIL_CHARS = 6000

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a large part of the machine
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "ENGINE_LOADER_COMPILE_CACHE__ENABLED": "false",  # what a test compiles is its own; those of the cache turn it on
}


class VllmServer:
    """One server in a session of its own, so that every process that it starts can be found and ended.

    `args` go to `vllm serve` behind the model; `env` is laid over this process's environment, and a value of None takes
    a variable away. Starts without compilation (`eager`) and with a context of 256 tokens unless `args` name another.
    Tensor-parallel 2 needs env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, one core for each rank.
    """

    PROGRAM = "vllm serve"
    STOP_TIMEOUT_S = STOP_TIMEOUT_S
    ENVIRONMENT: Mapping[str, str | None] = _ENVIRONMENT

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *args: str,
        env: Mapping[str, str | None] | None = None,
        eager: bool = True,
        start_timeout_s: float = START_TIMEOUT_S,
        log_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start_timeout_s = start_timeout_s
        self.seconds_to_ready: float | None = None
        self._command = self._make_command(model_dir, args, eager=eager)
        self._scratch = tempfile.TemporaryDirectory(prefix="engine-server-")
        starts = {"_ENGINE_LOADER_START": None, "ENGINE_LOADER_REPORT__DIRECTORY": f"{self._scratch.name}/starts"}
        changes = {**starts, **self.ENVIRONMENT, **(env or {})}
        if "HOME" in changes:  # a machine of its own: the default is below that
            del changes["ENGINE_LOADER_REPORT__DIRECTORY"]
        self._environment = _environment(changes)
        self.log_path = Path(log_path) if log_path is not None else Path(self._scratch.name) / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._final_log = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """All that the server has printed; it can be read after the server has stopped, too."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else self._final_log

    @property
    def processes(self) -> list[int]:
        """Its living processes; none before the start and after the stop."""
        return [] if self._process is None else _session_members(self._process.pid)

    def _make_command(self, model_dir: str | os.PathLike[str], args: tuple[str, ...], *, eager: bool) -> list[str]:
        program = Path(sys.executable).with_name("vllm")
        command = [str(program), "serve", os.fspath(model_dir), "--host", "127.0.0.1", "--port", str(self.port)]
        if eager:
            command.append("--enforce-eager")
        if "--max-model-len" not in args:
            command += ["--max-model-len", "256"]
        return [*command, *args]

    def start(self) -> None:
        """Returns when the server answers; raises RuntimeError with the end of its log when it dies or is too slow."""
        began = time.monotonic()
        self.seconds_to_ready = None
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(began + self.start_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.seconds_to_ready = time.monotonic() - began

    def _wait_until_ready(self, deadline: float) -> None:
        assert self._process is not None
        while not self._is_healthy():
            status = self._process.poll()
            if status is not None:
                raise RuntimeError(f"{self.PROGRAM} ended with status {status} before it was ready:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.PROGRAM} was not ready after {self.start_timeout_s:g} s:\n{self.log_tail()}")
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:  # refused while it starts; URLError and timeouts are OSErrors
            return False

    def log_tail(self) -> str:
        return self.log[-LOG_TAIL_CHARS:]

    def complete(self, prompt: str, max_tokens: int = 16) -> str:
        """The greedy completion, of exactly `max_tokens` tokens."""
        answer = self.post("/v1/completions", prompt=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return str(answer["choices"][0]["text"])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=REQUEST_TIMEOUT_S) as response:
            return json.load(response)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            return json.load(response)

    def end(self) -> None:
        """Asks it to end by itself (SIGTERM)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ends every process of the server; raises when one cannot be ended. Calling it again does nothing."""
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            _end_session(process, STARTING_STOP_TIMEOUT_S if self.seconds_to_ready is None else self.STOP_TIMEOUT_S)
        finally:
            self._final_log = self.log
            self._scratch.cleanup()


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    environment: dict[str, str | None] = {**os.environ, **changes}
    return {name: value for name, value in environment.items() if value is not None}


def _end_session(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM to the server, which ends its own processes; SIGKILL to what is left of the session after `grace_s`."""
    session = process.pid
    shared_memory = _shared_memory_of(session)
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _wait_for(lambda: process.poll() is not None and not _session_members(session), grace_s)
    finally:  # also when somebody cannot wait and presses Ctrl-C again
        shared_memory |= _shared_memory_of(session)
        _kill_session(process)
        for path in shared_memory:
            path.unlink(missing_ok=True)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    session = process.pid
    for pid in _session_members(session):
        if not _is_resource_tracker(pid):  # when the others are gone it removes their semaphores, and ends
            _kill(pid)
    _wait_for(lambda: not _session_members(session), STARTING_STOP_TIMEOUT_S)
    for pid in _session_members(session):
        _kill(pid)
    process.wait(STOP_TIMEOUT_S)
    if not _wait_for(lambda: not _session_members(session), STOP_TIMEOUT_S):
        raise RuntimeError(f"processes {_session_members(session)} of the server could not be ended")


def _shared_memory_of(session: int) -> set[Path]:
    """What vLLM's processes have mapped of /dev/shm, and do not remove: vLLM kills its own workers with SIGKILL.

    By vLLM's and multiprocessing's names only, so that what engine_loader leaves behind is not tidied away unseen.
    """
    names = set().union(*map(mapped_of_shared_memory, _session_members(session)))
    theirs = ("psm_", "sem.mp-", "vllm_dist_")
    return {Path("/dev/shm", name) for name in names if name.startswith(theirs) and not name.endswith("(deleted)")}


def _wait_for(condition: Callable[[], object], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_resource_tracker(pid: int) -> bool:
    with suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _session_members(session: int) -> list[int]:
    """The living processes of a session. Zombies whose parent has not asked for them yet are dead."""
    members = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            fields = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended in between
            continue
        state, member_of = fields[0], int(fields[3])
        if member_of == session and state not in "ZX":
            members.append(int(entry.name))
    return members
