"""Checkpoints in which every rank finds its own parameters and nothing else (sharded_state), for all engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from ...errors import CheckpointError
from ...formats.sharded_state import ShardRank
from ...loading.find import NoCheckpointError, SafetensorsFiles, ShardedState, find_checkpoint
from ...settings import LoaderSettings
from ...sources.registry import make_source


def files_of_rank(
    directory: str, settings: LoaderSettings, rank_of_ranks: Callable[[], tuple[ShardRank, int]]
) -> list[str] | None:
    """A rank's files, when ``directory`` is a sharded_state checkpoint; else None.

    Args:
        directory: the model's.
        settings: how to read.
        rank_of_ranks: says which rank of how many this is; not called where there is nothing of the kind.

    Raises:
        CheckpointError: it is one of another parallel layout, or the settings say that it is one and it is not.
    """
    source, pattern = make_source(settings.backend, settings=settings), settings.sharded_pattern
    try:
        found = find_checkpoint(source, directory, sharded_pattern=pattern)
    except NoCheckpointError:
        found = None
    match found:
        case ShardedState():
            return list(found.of_rank(*rank_of_ranks()).paths)
        case SafetensorsFiles(directory=None):
            return None  # no directory: the name of a model on the hub, or a file
    if pattern is not None:
        raise CheckpointError(f"no file is named as {pattern!r}", file=directory)
    return None


def refuse_in_place(directory: str, settings: LoaderSettings) -> None:
    """Refuse a sharded_state checkpoint as the new weights of a model that serves.

    Its tensors are a rank's parameters as they were before the engine prepared them for its kernels, and engines put
    weights in place by the names and shapes of original checkpoints.

    Raises:
        CheckpointError: ``directory`` is a sharded_state checkpoint.
    """
    try:
        found = find_checkpoint(
            make_source(settings.backend, settings=settings), directory, sharded_pattern=settings.sharded_pattern
        )
    except NoCheckpointError:
        return
    if isinstance(found, ShardedState):
        raise CheckpointError(
            "weights in place are taken from an original checkpoint, and this is a sharded_state one",
            file=directory,
            hint="start a server with it instead",
        )


def fill_state(
    missing: dict[str, torch.Tensor],
    weights: Iterable[tuple[str, torch.Tensor]],
    directory: str,
    *,
    hint: str,
    log: logging.Logger,
) -> None:
    """Copy a rank's tensors into the model's state, as the engines' own loaders of such checkpoints do.

    A tensor that is smaller than its parameter fills the beginning of it (adapters pad vocabularies).

    Args:
        missing: the state, without what shares memory with another part of it; emptied.
        weights: name and tensor.
        directory: for messages.
        hint: what to do when they do not fit.
        log: for warnings of conversions.

    Raises:
        CheckpointError: a tensor does not belong to the model or is too large for it, or some are missing.
    """

    def misfit(message: str) -> CheckpointError:
        return CheckpointError(message, file=directory, hint=hint)

    for name, tensor in weights:
        parameter = missing.pop(name, None)
        if parameter is None:
            raise misfit(f"{name!r} is not in the model's state, or twice in the checkpoint")
        target = parameter.data
        if target.dim() != tensor.dim() or any(
            size > room for size, room in zip(tensor.shape, target.shape, strict=True)
        ):
            raise misfit(f"{name!r} is {list(tensor.shape)}, the model has {list(target.shape)}")
        if target.shape != tensor.shape:
            log.warning("%s of shape %s fills a part of %s", name, list(tensor.shape), list(target.shape))
            for dim, size in enumerate(tensor.shape):
                target = target.narrow(dim, 0, size)
        if target.dtype != tensor.dtype:
            log.warning("%s is converted from %s to %s", name, tensor.dtype, target.dtype)
        target.copy_(tensor)
    if missing:
        shown = ", ".join(sorted(missing)[:5])
        raise misfit(f"{len(missing)} of the model's tensors are missing: {shown}")
