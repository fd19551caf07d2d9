"""vLLM: sharded_state checkpoints, in which every rank finds its own parameters and nothing else."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...errors import CheckpointError
from ...formats.sharded_state import PIPELINE_PATTERN, TENSOR_PATTERN, ShardRank, shards_by_rank
from ...loading.companions import Companion, companions_in, copy_companions
from ...loading.find import SafetensorsFiles
from ...loading.shards import open_files
from ...settings import LoaderSettings
from ...sources.posix import PosixSource
from ...sources.registry import make_source
from ..common import sharded
from ..common.sharded import files_of_rank
from .quantised_modules import modules_told_by_headers, write_modules
from .rank import Rank, rank_model

logger = logging.getLogger("vllm.engine_loader")

_SYSTEM_ERROR = re.compile(r"I/O error: .*\(os error (\d+)\)")
_MISFIT_HINT = "it was saved from another model, layout, or version of vLLM: engine-loader reshard writes it again"


def files_of_this_rank(directory: str, settings: LoaderSettings) -> list[str] | None:
    """This rank's files, when ``directory`` is a sharded_state checkpoint; else None.

    Raises:
        CheckpointError: it is one of another parallel layout, or the settings say that it is one and it is not.
    """
    return files_of_rank(directory, settings, _rank_of_ranks)


def _rank_of_ranks() -> tuple[ShardRank, int]:
    """Which rank of how many this is."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    stages = get_pp_group()
    rank = ShardRank(stages.rank_in_group, get_tensor_model_parallel_rank())
    return rank, get_tensor_model_parallel_world_size() * stages.world_size


def tie_as_saved(model: torch.nn.Module, model_config: Any, files: list[str], settings: LoaderSettings) -> None:
    """Tie head and embedding where the saved state has both as one.

    Such a state holds them under the head's name only, from which vLLM's configuration takes it, for all formats but
    its own sharded ones, that the head is a tensor of its own.
    """
    if not getattr(model_config, "word_embeddings_untied_by_checkpoint", False):
        return
    from vllm.model_executor.model_loader.weight_tying import _get_untied_lm_head

    untied = _get_untied_lm_head(model)
    if untied is None:
        return
    with open_files(make_source(settings.backend, settings=settings), SafetensorsFiles(tuple(files))) as opened:
        saved = {info.name for info in opened.tensors}
    embedding = next(name for name, part in model.named_modules() if part is untied.embed_tokens)
    if f"{embedding}.weight" in saved:
        return
    untied.tie(model)
    model_config.word_embeddings_untied_by_checkpoint = False
    model_config.hf_config.tie_word_embeddings = True
    model_config.hf_config.get_text_config().tie_word_embeddings = True


def fill_state(model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]], directory: str) -> None:
    """Copy a rank's tensors into the model's state, as vLLM's ShardedStateLoader does.

    Raises:
        CheckpointError: a tensor does not belong to the model or is too large for it, or some are missing.
    """
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    missing: dict[str, torch.Tensor] = ShardedStateLoader._filter_subtensors(model.state_dict())
    sharded.fill_state(missing, weights, directory, hint=_MISFIT_HINT, log=logger)


def reshard(
    model: str,
    out: str,
    layout: Rank,
    *,
    max_file_bytes: int | None = None,
    step: Callable[[str], object] = lambda name: None,
    **engine_args: Any,
) -> list[Path]:
    """Write ``model`` as a sharded_state checkpoint for a parallel layout, with all that is not weights beside it.

    Each rank's model is built and loaded in this process, one after another, and saved by vLLM's own save_model,
    before vLLM packs the weights for its kernels: that is the state into which a sharded_state checkpoint is loaded.
    Nothing appears in ``out`` before all is written.

    Args:
        model: directory of the model.
        out: directory that is made; must not exist, or be empty.
        layout: the sizes of the layout; its rank does not matter.
        max_file_bytes: a rank's tensors are spread over files of up to this size; None: one file a rank.
        step: called with the name of each step (a rank, the other files) as it begins.
        engine_args: further fields of vLLM's EngineArgs.

    Raises:
        CheckpointError: ``out`` is not empty or cannot be written, or the model is itself a sharded_state checkpoint.
    """
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    # Here, because the room of conversions imports torch.distributed.checkpoint, which engines start without.
    from ...conversion.destination import check_destination, unfinished_directory

    _check_model(model)
    check_destination(model, out, overwrite=None)
    # The pattern is given, for versions of vLLM differ in their default.
    pattern = PIPELINE_PATTERN if layout.pipeline_parallel_size > 1 else TENSOR_PATTERN
    others = companions_in(PosixSource(), model)
    modules: dict[str, list[str]] = {}
    with unfinished_directory(out, sum(companion.nbytes for companion in others)) as unfinished:
        for number in range(layout.world_size):
            step(f"rank {number} of {layout.world_size}")
            with rank_model(model, replace(layout, rank=number), **engine_args) as built, torch.no_grad():
                built.load()
                with _write_errors(out):
                    ShardedStateLoader.save_model(
                        built.module, str(unfinished), pattern=pattern, max_size=max_file_bytes
                    )
                modules = modules or modules_told_by_headers(built.config)
            del built
        step("the other files")
        _copy_other_files(Path(model), others, unfinished)
        write_modules(unfinished, modules)
    return sorted(Path(out).glob("*.safetensors"))


@contextmanager
def _write_errors(out: str) -> Iterator[None]:
    """Tell what the system said to a write of safetensors, which passes it on as a text."""
    try:
        yield
    except SafetensorError as error:
        said = _SYSTEM_ERROR.search(str(error))
        if said is None:
            raise
        raise CheckpointError(
            f"it could not be written: {os.strerror(int(said[1]))}", file=out, hint="nothing of it is left there"
        ) from error


def _check_model(model: str) -> None:
    if not os.path.isfile(os.path.join(model, "config.json")):
        raise CheckpointError("there is no config.json: this is not the directory of a model", file=model)
    if shards_by_rank(os.listdir(model)):
        raise CheckpointError(
            "this is a sharded_state checkpoint already", file=model, hint="start from the original checkpoint"
        )


def _copy_other_files(model: Path, others: list[Companion], out: Path) -> None:
    copy_companions(PosixSource(), str(model), others, out)
    # Who looks at the directory later wants to know where it came from.
    about = out / "sharded_state.json"
    about.write_text(json.dumps({"made_from": model.name}, indent=2) + "\n")
    for path in out.glob("*.safetensors"):  # safetensors makes them for this user alone, whatever the umask
        shutil.copymode(about, path)
