"""Reading weights for an engine: the stream of tensors with its log line, and the memory where they will go."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator

import torch

from ...loading.devices.per_tensor import TargetDevice
from ...loading.direct.load import DirectLoad
from ...loading.sharing import NodeRanks
from ...loading.weights import WeightFiles, stream_weights
from ...report.load_report import LoadReport
from ...settings import LoaderSettings
from ...transfer.memory.huge_pages import ask_for_huge_pages
from .accounts import is_first_rank, tell_load
from .start.warm_weights import loader_begins

Weights = Iterator[tuple[str, torch.Tensor]]


def prepare_memory(model: torch.nn.Module) -> None:
    """Ask for huge pages under the model's parameters and buffers, whoever copies the weights there."""
    ask_for_huge_pages(itertools.chain(model.parameters(), model.buffers()))


def read_weights(
    weights: WeightFiles,
    settings: LoaderSettings,
    *,
    log: logging.Logger,
    show_progress: bool = True,
    skip: Callable[[str], bool] | None = None,
    note: str | None = None,
    direct: DirectLoad | None = None,
    device: TargetDevice = None,
    ranks: NodeRanks | None = None,
) -> Weights:
    """Yield (name, tensor) as ``loading.weights.stream_weights``, and log its account of the load.

    How, ``tell_load`` says; only the first rank shows progress.

    Args:
        weights: the paths of safetensors files, or a training checkpoint.
        settings: how to read.
        log: the engine's logger.
        show_progress: show a bar.
        skip: a tensor for whose name it is true is not read.
        note: a remark for the log line.
        direct: the load in direct mode of which this is a part.
        device: where streamed tensors are put; None: in the CPU's memory.
        ranks: of this machine, that load the same files; None: this process alone.

    Raises:
        CheckpointError: a file, a header or the index is wrong, or bytes could not be read.
        SettingsError: GPUDirect Storage was asked for and cannot be used.
    """
    stock = loader_begins(weights, settings)
    report = LoadReport()
    return stream_weights(
        weights,
        settings,
        skip=skip,
        show_progress=show_progress and is_first_rank(),
        tell=functools.partial(tell_load, log, report),
        report=report,
        note=note,
        direct=direct,
        device=device,
        ranks=ranks,
        stock=stock,
    )
