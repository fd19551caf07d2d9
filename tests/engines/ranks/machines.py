"""Machines without any cache, each at a loopback address of its own, that share a model and a store, and no more."""

import os
import re
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.loopback_server import free_port
from tests.support.mappings import mapped_of_shared_memory
from tests.support.sglang_server import PROBE, SglangServer
from tests.support.vllm_server import VllmServer
from tests.support.waiting import wait_for

from .layouts import Layout

START_TIMEOUT_S = 900.0  # two ranks compile, on a busy machine
SAVE_TIMEOUT_S = 300.0
END_TIMEOUT_S = 120.0
PROMPT = "the quick brown fox"
TOKENS = 24
# What is no part of a restore: notes of this package, locks, and the headers that inductor compiles for each machine.
NOT_SHARED = re.compile(r"/(\.engine_loader|locks|precompiled_headers)/")
THEIRS = re.compile(r"psm_|sem\.|vllm_dist_|torch_|sglang_|sgl_|.*-cpushm_\d+")
DONE = ("compile cache: saved", "compile cache: nothing new to save", "nothing was saved")


@dataclass
class Node:
    """What one node was like.

    Attributes:
        log: all that it printed.
        files: what its caches hold, path -> mtime in ns.
        left: what was left of it when a rank had been killed: processes, shared memory, locks, markers.
    """

    log: str
    files: dict[str, int]
    left: list[str]

    @property
    def verdicts(self) -> list[str]:
        """Of its engines, in the order in which they told."""
        return re.findall(r"compile cache: ((?:hit|partial|miss)[^\n]*)", self.log)

    @property
    def restored(self) -> int:
        return sum(map(int, re.findall(r"compile cache: restored (\d+) files", self.log)))


@dataclass
class Start:
    """One start of an engine: its tokens, and its nodes."""

    text: str
    nodes: list[Node]


class Machines(ABC):
    """Starts engines on machines that are new each time.

    Args:
        directory: for the machines and their store.
        model: that they serve.
        variables: of every process.
    """

    worker: str
    """In the title of the processes that hold a rank."""
    caches: str
    """Where compile caches are on a machine, as a pattern."""
    followers_save_early = False
    """Whether nodes behind the first one save before the warm-up, in which they may compile more."""

    def __init__(self, directory: Path, model: Path, **variables: str | None) -> None:
        self.directory = directory
        self.model = model
        self.store = directory / "store"
        self.started = 0
        self.variables = variables

    @abstractmethod
    def server(self, number: int, *args: str, **options: Any) -> VllmServer:
        """A server for the node ``number``."""

    @abstractmethod
    def environment(self, machine: Path, number: int) -> dict[str, str | None]:
        """The engine's own variables on a machine."""

    def start(self, layout: Layout) -> Start:
        """Serve until the compile cache of each node is done; kill the last rank; wait until all have ended."""
        self.started += 1
        port = free_port()
        machines = [self._machine(number) for number in range(len(layout.nodes))]
        servers = [
            self.server(
                number,
                *layout.node(number, port),
                env={**self._environment(machine, number), **layout.variables},
                start_timeout_s=START_TIMEOUT_S,
                log_path=machine / "log",
            )
            for number, machine in enumerate(machines)
        ]
        with ExitStack() as stack:
            for server in reversed(servers):  # the others wait for the first, which answers when all are there
                stack.enter_context(server)
            text = servers[0].complete(PROMPT, max_tokens=TOKENS)
            for server, engines in zip(servers, layout.engines, strict=True):
                wait_for(lambda: _done(server) >= engines, SAVE_TIMEOUT_S)  # noqa: B023 - called at once
            shared = [set().union(*map(mapped_of_shared_memory, server.processes)) for server in servers]
            ranks = [self.ranks(server) for server in servers]
            assert tuple(map(len, ranks)) == layout.ranks
            os.kill(ranks[-1][-1], 9)
            _wait_for_end(servers[-1])
            for server in servers[:-1]:  # they do not notice that a rank of another node has ended
                server.end()
                _wait_for_end(server)
            left = [_left(*of_node) for of_node in zip(servers, shared, machines, strict=True)]
        nodes = [
            Node(server.log, self._files(machine), rest)
            for server, machine, rest in zip(servers, machines, left, strict=True)
        ]
        return Start(text, nodes)

    def ranks(self, server: VllmServer) -> list[int]:
        """The processes that hold a rank, in the order of their start."""
        return [pid for pid in sorted(server.processes) if self.worker in _title(pid)]

    def _machine(self, number: int) -> Path:
        machine = self.directory / f"start-{self.started}" / f"node-{number}"
        for name in ("home", "tmp", "probe"):
            (machine / name).mkdir(parents=True)
        return machine

    def _environment(self, machine: Path, number: int) -> dict[str, str | None]:
        return {
            "HOME": str(machine / "home"),
            "TMPDIR": str(machine / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": None,
            "TRITON_CACHE_DIR": None,
            "ENGINE_LOADER_COMPILE_CACHE__ENABLED": "true",
            "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(self.store),
            **self.environment(machine, number),
            **self.variables,
        }

    def _files(self, machine: Path) -> dict[str, int]:
        found = {}
        for path in machine.rglob("*"):
            name = str(path.relative_to(machine))
            if path.is_file() and re.match(self.caches, name) and not NOT_SHARED.search(name):
                found[name] = path.stat().st_mtime_ns
        return found


class VllmMachines(Machines):
    worker = "VLLM::Worker"
    caches = r"vllm/|tmp/torchinductor|home/\.triton"

    def __init__(self, directory: Path, model: Path, dtype: str = "float32", **variables: str | None) -> None:
        super().__init__(directory, model, **variables)
        # The path of a socket has at most 107 characters.
        self.sockets = tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True)
        self.dtype = dtype  # in bf16 the sums of two ranks may be other ones than one rank's

    def server(self, number: int, *args: str, **options: Any) -> VllmServer:
        kind = _VllmFollower if number else VllmServer
        return kind(self.model, "--load-format", "b10_3fs", "--dtype", self.dtype, *args, eager=False, **options)

    def environment(self, machine: Path, number: int) -> dict[str, str | None]:
        return {
            "VLLM_CACHE_ROOT": str(machine / "vllm"),
            "VLLM_HOST_IP": f"127.0.0.{number + 1}",
            "VLLM_RPC_BASE_PATH": self.sockets.name,
        }


class SglangMachines(Machines):
    worker = "sglang::scheduler"
    followers_save_early = True
    caches = r"home/\.cache/sglang|tmp/torchinductor|home/\.triton"

    def __init__(self, version: str, directory: Path, model: Path, **variables: str | None) -> None:
        super().__init__(directory, model, **variables)
        self.version = version

    def server(self, number: int, *args: str, **options: Any) -> VllmServer:
        kind = _SglangFollower if number else SglangServer
        return kind(
            self.version, self.model, "--load-format", "b10_3fs", "--dtype", "float32", *args, eager=False, **options
        )

    def environment(self, machine: Path, number: int) -> dict[str, str | None]:
        return {
            "SGLANG_CACHE_DIR": None,
            "SGLANG_HOST_IP": f"127.0.0.{number + 1}",
            "SGLANG_CPU_OMP_THREADS_BIND": str(number),  # schedulers poll: each node has a core of its own
            "PYTHONPATH": str(PROBE),
            "SGLANG_PROBE": str(machine / "probe"),
            "SGLANG_PROBE_COMPILES": "silu",
        }


class _VllmFollower(VllmServer):
    """A node without an API server: up as soon as it runs."""

    def _is_healthy(self) -> bool:
        return True


class _SglangFollower(SglangServer):
    """As above."""

    def _is_healthy(self) -> bool:
        return True


def _wait_for_end(server: VllmServer) -> None:
    """Until none of its processes is left, or until that takes too long."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while server.processes and time.monotonic() < deadline:
        time.sleep(0.2)


def _done(server: VllmServer) -> int:
    return sum(server.log.count(words) for words in DONE)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _left(server: VllmServer, shared: set[str], machine: Path) -> list[str]:
    """What is left of a node.

    What of the engine's own (by its names) stays in shared memory behind a kill is not ours to remove, and is removed
    here.
    """
    left = [_title(pid) for pid in server.processes]
    for path in (Path("/dev/shm", name) for name in shared):
        if path.exists() and THEIRS.match(path.name):
            path.unlink()
        elif path.exists():
            left.append(str(path))
    left += [str(path) for path in machine.rglob("trial-*") if "/.engine_loader/" in str(path)]
    left += [str(path) for path in machine.glob("tmp/*") if "engine" in path.name or "compile-cache" in path.name]
    return left
