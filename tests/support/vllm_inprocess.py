"""Loads models with vLLM's own loaders in this process, or one process per tensor-parallel rank, without its engine.

    expected = load_state(directory, "auto")
    actual = load_state(directory, "b10_3fs")
    assert not differences(expected[0], actual[0])

Memory that a model does not initialise is filled with NaN (or the largest integer) before its weights are loaded: else
it could hold the weights of the model before, and a tensor that a loader forgets would pass for one that it loaded.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from engine_loader.engines.vllm.rank import Rank, RankModel, rank_model

RANK_TIMEOUT_S = 240
_CPU_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}

State = dict[str, torch.Tensor]


def load_model(
    model_dir: str | os.PathLike[str],
    load_format: str,
    extra_config: Mapping[str, Any] | None = None,
    *,
    tp: int = 1,
    rank: int = 0,
    init_method: str | None = None,
    post_process: bool = False,
    of_draft: bool = False,
    **engine_args: Any,
) -> nn.Module:
    """The model as vLLM's `get_model` returns it, on CPU.

    Several models can be loaded one after another; `tp`, `rank` and `init_method` (needed when tp > 1) must stay the
    same in one process. Without `post_process` the weights are as the loader left them: on CPU, vLLM's next step packs
    them for its kernels and empties the parameters, and nothing would be left to compare. ``of_draft``: the draft model
    of the ``speculative_config`` instead of the one that it serves.
    """
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    arguments: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True, **engine_args}
    with _inspection_in_this_process():
        config = EngineArgs(
            model=os.fspath(model_dir),
            load_format=load_format,
            model_loader_extra_config=dict(extra_config or {}),
            tensor_parallel_size=tp,
            **arguments,
        ).create_engine_config()
    with set_current_vllm_config(config), _mended_loading(post_process):
        _join_ranks(tp, rank, init_method)
        _spare_the_garbage_collector()
        options: dict[str, Any] = {}
        if of_draft:
            from vllm.model_executor.model_loader.utils import get_draft_load_config  # as of 0.31

            options["model_config"] = config.speculative_config.draft_model_config
            options["load_config"] = get_draft_load_config(config)
        model: nn.Module = get_model(vllm_config=config, **options)
        return model


@contextmanager
def _inspection_in_this_process() -> Iterator[None]:
    """vLLM asks a new process, 8-10 s for each architecture, whether a model class generates text, pools and so on."""
    from vllm.model_executor.models import registry

    with mock.patch.object(registry, "_run_in_subprocess", lambda inspect: inspect()):
        yield


def _join_ranks(tp: int, rank: int, init_method: str | None) -> None:
    """vLLM's process groups over gloo. The world stays; the groups inside it depend on the model (experts or none)."""
    from vllm.distributed import parallel_state

    if init_method is None:
        if tp > 1:
            raise ValueError("ranks that load together need a common init_method; load_state() starts them")
        # A store of its own for every world: the last one's keys would confuse it.
        init_method = f"file://{_scratch_of_this_process().name}/store-{time.monotonic_ns()}"
    os.environ.setdefault("VLLM_DIST_IDENT", Path(init_method).parent.name)  # names the ranks' shared memory
    parallel_state.init_distributed_environment(tp, rank, init_method, rank, "gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.ensure_model_parallel_initialized(tp, 1)


@cache
def _scratch_of_this_process() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="vllm-inprocess-")  # goes when the process ends


@cache
def _spare_the_garbage_collector() -> None:
    """vLLM collects garbage twice in each load, 0.4 s each over what its imports left behind."""
    gc.collect()
    gc.freeze()


@contextmanager
def _mended_loading(post_process: bool) -> Iterator[None]:
    from vllm.model_executor.model_loader import base_loader

    initialize_model = base_loader.initialize_model

    def initialize_with_filled_memory(*args: Any, **kwargs: Any) -> Any:
        with _filled_memory():
            return initialize_model(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(base_loader, "initialize_model", initialize_with_filled_memory))
        # As vLLM's own CPU worker does: without an accelerator the call raises.
        stack.enter_context(mock.patch.object(torch.accelerator, "empty_cache", lambda: None))
        if not post_process:
            stack.enter_context(mock.patch.object(base_loader, "process_weights_after_loading", lambda *_: None))
        yield


@contextmanager
def _filled_memory() -> Iterator[None]:
    """torch.empty fills its memory only in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def state_of(model: nn.Module) -> State:
    """A copy of every parameter and every buffer, tied and non-persistent ones too, under its name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def differences(expected: State, actual: State) -> list[str]:
    """What is not the same, bit for bit; empty when all is."""
    found = [f"{name}: only in one of them" for name in sorted(expected.keys() ^ actual.keys())]
    for name in sorted(expected.keys() & actual.keys()):
        left, right = expected[name], actual[name]
        if left.dtype != right.dtype or left.shape != right.shape or left.stride() != right.stride():
            found.append(f"{name}: {_kind(left)} became {_kind(right)}")
        elif (unequal := int((_bits(left) != _bits(right)).sum())) > 0:
            found.append(f"{name}: {unequal} of {left.nbytes} bytes differ")
    return found


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN is not equal to itself, its bytes are."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def load_state(
    model_dir: str | os.PathLike[str],
    load_format: str,
    extra_config: Mapping[str, Any] | None = None,
    *,
    tp: int = 1,
    **engine_args: Any,
) -> list[State]:
    """What each rank holds after loading: here for one rank, in a process of its own for each of several."""
    if tp == 1:
        model = load_model(model_dir, load_format, extra_config, **engine_args)
        state = state_of(model)
        del model
        gc.collect()
        return [state]
    return load_states_in_ranks([(model_dir, load_format, dict(extra_config or {}), engine_args)], tp=tp)[0]


def load_state_as(
    model_dir: str | os.PathLike[str],
    load_format: str,
    rank: Rank,
    extra_config: Mapping[str, Any] | None = None,
    **engine_args: Any,
) -> tuple[State, Any]:
    """What one rank of several holds after loading, in this process and without the others; and the loader."""
    arguments = {"dtype": "bfloat16", "max_model_len": 256, **engine_args}
    with rank_as(model_dir, load_format, rank, extra_config, **arguments) as built:
        built.load()
        return state_of(built.module), built.loader


@contextmanager
def rank_as(
    model_dir: str | os.PathLike[str],
    load_format: str,
    rank: Rank,
    extra_config: Mapping[str, Any] | None = None,
    **engine_args: Any,
) -> Iterator[RankModel]:
    """One rank's model, its memory full of NaN."""
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with (
        _filled_memory(),
        rank_model(model_dir, rank, load_format=load_format, extra_config=extra_config, **engine_args) as built,
    ):
        yield built


Job = tuple[str | os.PathLike[str], str, dict[str, Any], dict[str, Any]]


def load_states_in_ranks(jobs: Sequence[Job], *, tp: int) -> list[list[State]]:
    """For every job (model_dir, load_format, extra_config, engine_args) the states of all ranks.

    The ranks are started once (seconds each) and load the models one after another, so give several jobs in one call.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-ranks-") as scratch:
        request = {
            "tp": tp,
            "init_method": f"file://{scratch}/store",
            "jobs": [[os.fspath(j[0]), *j[1:]] for j in jobs],
        }
        (Path(scratch) / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", __name__, scratch]
        with ExitStack() as stack:
            ranks = [stack.enter_context(_rank_process([*command, str(rank)], scratch, rank)) for rank in range(tp)]
            for rank, process in enumerate(ranks):
                if process.wait(RANK_TIMEOUT_S) != 0:
                    log = (Path(scratch) / f"rank-{rank}.log").read_text(errors="replace")
                    raise RuntimeError(f"rank {rank} of {tp} failed with status {process.returncode}:\n{log[-6000:]}")
        return [
            [torch.load(Path(scratch) / f"job-{job}-rank-{rank}.pt") for rank in range(tp)] for job in range(len(jobs))
        ]


@contextmanager
def _rank_process(command: list[str], scratch: str, rank: int) -> Iterator[subprocess.Popen[bytes]]:
    root = Path(__file__).resolve().parents[2]
    with (Path(scratch) / f"rank-{rank}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _serve_as_rank(scratch: Path, rank: int) -> None:
    request = json.loads((scratch / "request.json").read_text())
    for number, (model_dir, load_format, extra_config, engine_args) in enumerate(request["jobs"]):
        model = load_model(
            model_dir,
            load_format,
            extra_config,
            tp=request["tp"],
            rank=rank,
            init_method=request["init_method"],
            **engine_args,
        )
        torch.save(state_of(model), scratch / f"job-{number}-rank-{rank}.pt")
        del model
        gc.collect()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One rank of load_states_in_ranks(); not for use by hand.")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("rank", type=int)
    given = parser.parse_args()
    _serve_as_rank(given.scratch, given.rank)
