"""SGLang: which processes of this machine load the same layers, and which tensors are one rank's alone."""

from __future__ import annotations

from typing import Any

from ...loading.sharing import NodeRanks
from ...settings import LoaderSettings
from ...transfer.cpus import ranks_of_node
from ..common.names import is_of_one_expert


def node_ranks(settings: LoaderSettings) -> NodeRanks | None:
    """The ranks of this machine that load what this one loads; None where SGLang does not say.

    Read in SGLang 0.5.9 to 0.5.23.
    """
    from sglang.srt.distributed import parallel_state

    try:
        count = min(parallel_state.get_tp_group().world_size, ranks_of_node())
    except AssertionError:  # there are no groups
        return None
    if settings.ranks_per_node is not None:
        count = max(1, settings.ranks_per_node // parallel_state.get_pp_group().world_size)
    experts: Any = getattr(parallel_state, "get_moe_expert_parallel_world_size", None)
    if experts is not None and experts() > 1:
        return NodeRanks(count, is_of_one_expert)
    return NodeRanks(count)
