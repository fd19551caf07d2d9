"""A real Ray on loopback: nodes at addresses of their own, each with room for some ranks, and a home of its own."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.loopback_server import free_port
from tests.support.vllm_server import VllmServer

PACKAGES = Path(os.environ.get("RAY_PACKAGES", ".venv/ray")).absolute()
"""Where ``make test-ranks`` installs Ray."""
ON_CPU = Path(__file__).parent / "ray_on_cpu"
FIRST_ADDRESS = 2  # Ray takes 127.0.0.1 for the machine's own address


def ray_variables() -> dict[str, str | None]:
    """Of every process of Ray and of a server on it."""
    return {
        "PYTHONPATH": os.pathsep.join((str(PACKAGES), str(ON_CPU))),
        "RAY_RANKS_ON_CPU": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }


def address(number: int) -> str:
    return f"127.0.0.{FIRST_ADDRESS + number}"


class RayNode(VllmServer):
    """``ray start`` in a session of its own, so that all its processes can be found and ended."""

    PROGRAM = "ray start"

    def __init__(self, number: int, port: int, ranks: int, temporary: str, **options: Any) -> None:
        self._number, self._port_of_ray, self._ranks, self._temporary = number, port, ranks, temporary
        super().__init__("", **options)

    def _make_command(self, model_dir: str | os.PathLike[str], args: tuple[str, ...], *, eager: bool) -> list[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--num-cpus=1", f"--num-gpus={self._ranks}", "--object-store-memory=100000000"]
        command += [f"--node-ip-address={address(self._number)}"]
        if self._number:
            return [*command, f"--address={address(0)}:{self._port_of_ray}"]
        return [
            *command,
            "--head",
            "--include-dashboard=false",
            f"--port={self._port_of_ray}",
            f"--temp-dir={self._temporary}",
        ]

    def _is_healthy(self) -> bool:
        return "Ray runtime started" in self.log


@contextmanager
def ray_cluster(environments: list[Mapping[str, str | None]], ranks: int) -> Iterator[tuple[str, list[RayNode]]]:
    """Within, a cluster of a node for each of ``environments``; its address, and the nodes."""
    port = free_port()
    # Its sockets lie there, and their paths must be short.
    temporary = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    with temporary as directory, ExitStack() as stack:
        nodes = [
            stack.enter_context(RayNode(number, port, ranks, directory, env={**environment, **ray_variables()}))
            for number, environment in enumerate(environments)
        ]
        yield f"{address(0)}:{port}", nodes
