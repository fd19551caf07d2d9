"""The parallel layouts that are tried with real ranks: one table for each engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

PORT = "PORT"
"""In arguments: a port that is free, the same for all nodes."""

_LEADER, _FOLLOWER = "127.0.0.1", "127.0.0.2"


@dataclass(frozen=True)
class Layout:
    """One way to spread an engine over ranks and nodes.

    Attributes:
        name: of the test.
        scope: the end of the compile cache's scope.
        arguments: that every node gets.
        nodes: arguments of each node besides; the first one has the API server.
        engines: how many engines of each node tell a verdict and save.
        ranks: how many processes of each node hold a rank.
        model: a key of tests.support.tiny_models.ARCHITECTURES.
        variables: environment variables of every node.
    """

    name: str
    scope: str
    arguments: tuple[str, ...]
    nodes: tuple[tuple[str, ...], ...] = ((),)
    engines: tuple[int, ...] = (1,)
    ranks: tuple[int, ...] = (2,)
    model: str = "llama"
    variables: Mapping[str, str] = field(default_factory=dict)

    def node(self, number: int, port: int) -> tuple[str, ...]:
        """The arguments of a node."""
        return tuple(argument.replace(PORT, str(port)) for argument in (*self.arguments, *self.nodes[number]))

    def __str__(self) -> str:
        return self.name


# vLLM's CPU build: one core for each rank, by its number on its node.
_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
_TP, _PP, _DP = "--tensor-parallel-size=2", "--pipeline-parallel-size=2", "--data-parallel-size=2"
_ONE_API = "--api-server-count=1"
_NODES = ("--nnodes=2", f"--master-addr={_LEADER}", f"--master-port={PORT}")
_BY_NODE = (("--node-rank=0",), ("--node-rank=1", "--headless"))
_DP_NODES = ("--data-parallel-size-local=1", f"--data-parallel-address={_LEADER}", f"--data-parallel-rpc-port={PORT}")
_BY_ENGINE = ((_ONE_API,), ("--headless", "--data-parallel-start-rank=1"))

_SHARED = '--model-loader-extra-config={"read_mode": "direct", "share": "auto"}'
SHORT = Layout("tp2", "tp2_pp1_dp1", (_TP, _SHARED), variables=_CORES)
"""The one that is among the tests of every change."""

VLLM = (
    Layout("pp2", "tp1_pp2_dp1", (_PP,), variables=_CORES),
    # Engines of a model without experts know nothing of each other.
    Layout("dp2", "tp1_pp1_dp1", (_DP, _ONE_API), engines=(2,), variables=_CORES),
    # Each rank has a part of every expert: of whole ones vLLM's CPU build can compute nothing, see docs/vllm.md.
    Layout("tp2-experts", "tp2_pp1_dp1", (_TP,), model="qwen3-moe", variables=_CORES),
    Layout("tp2-two-nodes", "tp2_pp1_dp1", (_TP, *_NODES), _BY_NODE, (1, 1), (1, 1)),
    Layout("pp2-two-nodes", "tp1_pp2_dp1", (_PP, *_NODES), _BY_NODE, (1, 1), (1, 1)),
    Layout("dp2-two-nodes", "tp1_pp1_dp1", (_DP, *_DP_NODES), _BY_ENGINE, (1, 1), (1, 1)),
)

_SGLANG_CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
_SGLANG_NODES = ("--nnodes=2", f"--dist-init-addr={_LEADER}:{PORT}")
_SGLANG_BY_NODE = (("--node-rank=0",), ("--node-rank=1",))

SGLANG = (
    Layout("tp2", "tp2_pp1_dp1", ("--tp-size=2",), variables=_SGLANG_CORES),
    Layout("tp2-two-nodes", "tp2_pp1_dp1", ("--tp-size=2", *_SGLANG_NODES), _SGLANG_BY_NODE, (1, 1), (1, 1)),
)
