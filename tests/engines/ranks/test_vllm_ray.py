"""vLLM's executor of Ray on a real Ray: its workers get all variables of the engine's process, on every node."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.waiting import wait_for

from .checks import only_restored
from .layouts import Layout
from .machines import END_TIMEOUT_S, PROMPT, SAVE_TIMEOUT_S, START_TIMEOUT_S, TOKENS, Node, Start, VllmMachines
from .ray_cluster import PACKAGES, address, ray_cluster, ray_variables

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PACKAGES.exists(), reason="Ray is not installed: make test-ranks"),
]

TWO_NODES = Layout(
    "tp2-ray",
    "tp2_pp1_dp1",
    ("--tensor-parallel-size=2", "--distributed-executor-backend=ray"),
    nodes=((), ()),
)


class OnRay(VllmMachines):
    """Each machine is a node of a cluster that has room for one rank; the server runs on the first one."""

    worker = "ray::RayWorkerProc"

    def start(self, layout: Layout) -> Start:
        self.started += 1
        machines = [self._machine(number) for number in range(len(layout.nodes))]
        environments = [
            {**self._environment(machine, number), "VLLM_HOST_IP": address(number)}
            for number, machine in enumerate(machines)
        ]
        with ray_cluster(environments, 1) as (cluster, nodes):
            env = {**environments[0], **ray_variables(), "RAY_ADDRESS": cluster}
            options = {"env": env, "start_timeout_s": START_TIMEOUT_S, "log_path": machines[0] / "log"}
            with self.server(0, *layout.arguments, **options) as server:
                text = server.complete(PROMPT, max_tokens=TOKENS)
                # Ray prints what its workers say into the server's log.
                wait_for(lambda: len(_verdicts(server.log)) >= len(nodes), SAVE_TIMEOUT_S)
                (rank,) = self.ranks(nodes[-1])
                os.kill(rank, 9)
                deadline = time.monotonic() + END_TIMEOUT_S
                while time.monotonic() < deadline and (server.processes or any(map(self.ranks, nodes))):
                    time.sleep(0.2)
                left = [str(pid) for alive in (server.processes, *map(self.ranks, nodes)) for pid in alive]
        left += [str(path) for machine in machines for path in machine.rglob(".engine_loader/trial-*")]
        return Start(text, [Node(server.log, self._files(machine), left) for machine in machines])


def _verdicts(log: str) -> list[str]:
    """Ray's two nodes print each line of a worker, which begins with its process and the time, once each."""
    lines = {line.rpartition("\x1b[0m ")[2] for line in log.splitlines() if "compile cache: " in line}
    return sorted(verdict for line in lines for verdict in Node(line, {}, []).verdicts)


def test_the_ranks_of_two_nodes_restore_each_from_the_store_and_save(
    model: Callable[[str], Path], one_rank: Callable[[str], str], tmp_path: Path
) -> None:
    machines = OnRay(tmp_path, model("llama"))
    cold, restored = machines.start(TWO_NODES), machines.start(TWO_NODES)
    assert cold.text == restored.text == one_rank("llama")
    assert [verdict.partition(";")[0] for verdict in _verdicts(cold.nodes[0].log)] == ["miss", "miss"]
    assert _verdicts(restored.nodes[0].log) == ["hit", "hit"]
    for before, node in zip(cold.nodes, restored.nodes, strict=True):
        assert before.left == node.left == []
        assert before.files
    only_restored(cold, restored)
