"""What the loader classes of all engines share: the options, whether direct mode can serve, and the reading itself.

An engine's own names stay in its adapter.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import SettingsError
from ..loading.devices import CudaDevices
from ..loading.direct import DirectLoad
from ..loading.weights import stream_weights
from ..plugin import LOAD_FORMAT
from ..settings import LoaderSettings
from ..transfer.huge_pages import ask_for_huge_pages

Weights = Iterator[tuple[str, torch.Tensor]]


def split_options(
    extra_config: Any, *, engine: str, kept: Collection[str] = (), refused: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our keys of --model-loader-extra-config, and the engine's.

    Args:
        extra_config: its value.
        engine: the engine's name, for messages.
        kept: keys that stay the engine's.
        refused: keys that the engine's own reader takes and that would do nothing here.

    Raises:
        SettingsError: it is no mapping, or has a key of ``refused``.
    """
    if not isinstance(extra_config, Mapping):
        raise SettingsError(f"--model-loader-extra-config must be a JSON object, not {type(extra_config).__name__}")
    for key in refused:
        if key in extra_config:
            raise SettingsError(f"--model-loader-extra-config: {key} is for {engine}'s own reader; here, set threads")
    own = {key: value for key, value in extra_config.items() if key not in kept}
    return own, {key: value for key, value in extra_config.items() if key in kept}


def plan_mode(settings: LoaderSettings, model: torch.nn.Module) -> tuple[bool, str | None]:
    """Whether ``model`` is loaded in direct mode; if it is streamed for a reason, a note about that.

    Raises:
        SettingsError: direct mode was asked for and cannot serve.
    """
    obstacle = None if settings.mode == "stream" else obstacle_to_direct(model, settings)
    if obstacle and settings.mode == "direct":
        raise SettingsError(f"mode: direct cannot serve here: {obstacle}; set mode to auto or stream")
    return settings.mode != "stream" and not obstacle, f"streamed: {obstacle}" if obstacle else None


def prepare_memory(model: torch.nn.Module) -> None:
    """Ask for huge pages where the weights will go, whoever copies them there."""
    ask_for_huge_pages(itertools.chain(model.parameters(), model.buffers()))


def obstacle_to_direct(model: torch.nn.Module, settings: LoaderSettings) -> str | None:
    """Why this model cannot be loaded in direct mode, if so."""
    places = {parameter.device for parameter in model.parameters()}
    devices = {place.type for place in places}
    if devices - {"cpu", "cuda", "meta"}:
        return f"parameters are on {', '.join(sorted(devices - {'cpu'}))}"
    if "cuda" in devices:
        cuda = CudaDevices(settings)
        numbers = [place.index for place in places if place.index is not None]
        obstacle = cuda.obstacle() or next(filter(None, map(cuda.obstacle_on, numbers)), None)
        if obstacle:
            return f"parameters are on cuda, and {obstacle}"
    online = any(getattr(getattr(part, "quant_method", None), "uses_meta_device", False) for part in model.modules())
    if online or "meta" in devices:
        return "weights are quantised, or their memory made, while they are loaded"
    return None


def read_weights(
    weights: Sequence[str] | str,
    settings: LoaderSettings,
    *,
    log: logging.Logger,
    show_progress: bool = True,
    skip: Callable[[str], bool] | None = None,
    note: str | None = None,
    direct: DirectLoad | None = None,
) -> Weights:
    """``stream_weights`` with its account in the engine's log: of the first rank for all, of the others for debugging.

    Raises:
        CheckpointError: a file, a header or the index is wrong, or bytes could not be read.
    """
    first = is_first_rank()
    return stream_weights(
        weights,
        settings,
        skip=skip,
        show_progress=show_progress and first,
        tell=functools.partial(log.log, logging.INFO if first else logging.DEBUG, "%s: %s", LOAD_FORMAT),
        note=note,
        direct=direct,
    )


def is_first_rank() -> bool:
    """Whether this is the rank that speaks for all."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
