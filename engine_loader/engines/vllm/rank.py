"""vLLM: any rank's model in this process, on the CPU, without the other ranks.

torch's "fake" process groups answer every collective with nothing, which is enough to build a model and to load its
weights: no loader of vLLM asks other ranks for anything. So one process can explain, prepare or test the load of every
rank.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import SettingsError
from ...replacing import replaced

_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}


@dataclass(frozen=True)
class Rank:
    """One rank of a parallel layout.

    Attributes:
        tensor_parallel_size, pipeline_parallel_size: the layout of one replica of the model.
        rank: number within the replica: pipeline stage times tensor-parallel size plus tensor-parallel rank.
        expert_parallel: whole experts are spread over the tensor-parallel ranks, instead of slices of every expert.

    Raises:
        SettingsError: ``rank`` is negative, or not below the number of ranks.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    rank: int = 0
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise SettingsError(f"there is no rank {self.rank} of {self.world_size}; they are numbered from 0")

    @property
    def world_size(self) -> int:
        """How many ranks one replica has."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass
class RankModel:
    """A rank's model, its weights not yet loaded.

    Attributes:
        module: the model, initialised.
        config: vLLM's configuration (VllmConfig) for this rank.
        loader: vLLM's loader for the load format.
    """

    module: torch.nn.Module
    config: Any
    loader: Any = field(repr=False)

    def load(self) -> None:
        """Load the weights as vLLM does, but do not pack them for its kernels, which is vLLM's next step."""
        self.loader.load_weights(self.module, self.config.model_config)


@contextmanager
def rank_model(
    model: str | os.PathLike[str],
    rank: Rank,
    *,
    load_format: str = "b10_3fs",
    extra_config: Mapping[str, Any] | None = None,
    **engine_args: Any,
) -> Iterator[RankModel]:
    """The initialised model of one rank; while the block runs, vLLM takes this process for that rank.

    Parameters are allocated and not written: they take no physical memory before weights are loaded.

    Args:
        model: directory of the model.
        rank: the layout and the rank in it.
        load_format: vLLM's option --load-format.
        extra_config: vLLM's option --model-loader-extra-config.
        engine_args: further fields of vLLM's EngineArgs.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins
    from vllm.utils.torch_utils import set_default_torch_dtype

    load_general_plugins()
    # vLLM inspects a model class in a process of its own (8-10 s), lest it initialise a device here.
    with replaced(registry, "_run_in_subprocess", lambda inspect: inspect()):
        config = EngineArgs(
            model=os.fspath(model),
            load_format=load_format,
            model_loader_extra_config=dict(extra_config or {}),
            tensor_parallel_size=rank.tensor_parallel_size,
            pipeline_parallel_size=rank.pipeline_parallel_size,
            enable_expert_parallel=rank.expert_parallel,
            distributed_executor_backend="mp" if rank.world_size > 1 else None,
            enforce_eager=True,
            **engine_args,
        ).create_engine_config()
    with set_current_vllm_config(config), process_groups_of(rank):
        loader = get_model_loader(config.load_config)
        with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
            module = initialize_model(vllm_config=config, model_config=config.model_config)
        yield RankModel(module, config, loader)


@contextmanager
def process_groups_of(rank: Rank) -> Iterator[None]:
    """While the block runs, vLLM's process groups are those of ``rank``, with no processes for the other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state

    new_group = torch.distributed.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})

    def group(group_ranks: list[list[int]], local_rank: int, backend: str, *_: Any, **options: Any) -> Any:
        return parallel_state.GroupCoordinator(
            group_ranks=group_ranks,
            local_rank=local_rank,
            torch_distributed_backend="fake",
            use_device_communicator=False,
            group_name=options.get("group_name"),
        )

    _leave_groups()
    with ExitStack() as stack:
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # torch has it print "[rank0]: " before every line
        stack.enter_context(replaced(torch.distributed, "new_group", fake_group))
        stack.enter_context(replaced(parallel_state, "init_model_parallel_group", group))
        stack.enter_context(replaced(parallel_state, "_node_count", lambda *_: 1))
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank.rank, world_size=rank.world_size)
        stack.callback(_leave_groups)
        parallel_state.init_distributed_environment(rank.world_size, rank.rank, "env://", rank.rank, "fake")
        parallel_state.initialize_model_parallel(rank.tensor_parallel_size, rank.pipeline_parallel_size, backend="fake")
        yield


def _leave_groups() -> None:
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    gc.collect()
