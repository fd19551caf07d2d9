"""vLLM: which processes of this machine load the same layers, and which tensors are one rank's alone."""

from __future__ import annotations

from typing import Any

from ...loading.sharing import NodeRanks
from ...settings import LoaderSettings
from ..common.names import is_of_one_expert


def node_ranks(settings: LoaderSettings) -> NodeRanks | None:
    """The ranks of this machine that load what this one loads; None where vLLM does not say.

    Read in vLLM 0.10.1 to 0.33: the configuration is the current one while weights are loaded.
    """
    from vllm.config import get_current_vllm_config

    try:
        parallel: Any = get_current_vllm_config().parallel_config
    except (AssertionError, RuntimeError):  # there is no current one
        return None
    stages = parallel.pipeline_parallel_size
    tensor = parallel.tensor_parallel_size * getattr(parallel, "prefill_context_parallel_size", 1)
    here = getattr(parallel, "local_world_size", parallel.world_size)
    replicas = parallel.data_parallel_size_local if parallel.data_parallel_size > 1 else 1
    count = min(tensor, here) * max(1, replicas)
    if settings.ranks_per_node is not None:  # replicas that know nothing of each other, too
        count = max(1, settings.ranks_per_node // stages)
    if parallel.enable_expert_parallel:
        return NodeRanks(count, is_of_one_expert)
    return NodeRanks(count)
