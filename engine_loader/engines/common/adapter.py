"""What the loader classes of all engines share: the options, whether direct mode can serve, and the reading itself.

An engine's own names stay in its adapter.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ...errors import SettingsError
from ...loading.devices.cuda import CudaDevices
from ...loading.direct.load import DirectLoad
from ...loading.weights import WeightFiles, stream_weights
from ...plugin import LOAD_FORMAT
from ...report.load import human_bytes
from ...settings import LoaderSettings
from ...transfer.memory.huge_pages import ask_for_huge_pages

Weights = Iterator[tuple[str, torch.Tensor]]
_MADE_WHILE_LOADING = "weights are quantised, or their memory made, while they are loaded"


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


class LoadPlan(NamedTuple):
    """How a model is loaded.

    Attributes:
        directly: in direct mode.
        note: about why it is streamed, or handed over in the CPU's memory, where something spoke against the other.
        device: where tensors are handed over that are streamed; None: in the CPU's memory.
    """

    directly: bool
    note: str | None
    device: torch.device | None


def plan_mode(settings: LoaderSettings, model: torch.nn.Module) -> LoadPlan:
    """How ``model`` is loaded.

    Raises:
        SettingsError: direct mode, or GPUDirect Storage, was asked for and cannot serve.
    """
    obstacle = None if settings.mode == "stream" else obstacle_to_direct(model, settings)
    if obstacle and settings.mode == "direct":
        raise SettingsError(f"mode: direct cannot serve here: {obstacle}; set mode to auto or stream")
    directly = settings.mode != "stream" and not obstacle
    device, why = _place_of_streamed(model, settings)
    if why and settings.transport == "gds":
        raise SettingsError(f"transport: gds cannot serve here: {why}; set transport to auto")
    notes = [f"streamed: {obstacle}"] if obstacle else []
    if why and not directly:
        notes.append(f"handed over in CPU memory: {why}")
    return LoadPlan(directly, "; ".join(notes) or None, device)


def prepare_memory(model: torch.nn.Module) -> None:
    """Ask for huge pages where the weights will go, whoever copies them there."""
    ask_for_huge_pages(itertools.chain(model.parameters(), model.buffers()))


def obstacle_to_direct(model: torch.nn.Module, settings: LoaderSettings) -> str | None:
    """Why this model cannot be loaded in direct mode, if so."""
    if settings.transport == "gds":
        return "transport: gds reads whole tensors"
    places = {parameter.device for parameter in model.parameters()}
    devices = {place.type for place in places}
    if devices - {"cpu", "cuda", "meta"}:
        return f"parameters are on {', '.join(sorted(devices - {'cpu'}))}"
    if "cuda" in devices:
        obstacle = _obstacle_to_cuda(places, settings)
        if obstacle:
            return f"parameters are on cuda, and {obstacle}"
    if _is_made_while_loading(model) or "meta" in devices:
        return _MADE_WHILE_LOADING
    return None


def _place_of_streamed(model: torch.nn.Module, settings: LoaderSettings) -> tuple[torch.device | None, str | None]:
    """The device where streamed tensors are handed over; None: in the CPU's memory, and why, for a model on a GPU."""
    places = {parameter.device for parameter in model.parameters()}
    if all(place.type != "cuda" for place in places):
        return None, None
    place = next(place for place in places if place.type == "cuda")
    if settings.stream_device == "cpu":
        return None, "stream_device is cpu"
    if len(places) > 1:
        return None, f"parameters are on {', '.join(sorted(map(str, places)))}"
    if _is_made_while_loading(model):
        return None, _MADE_WHILE_LOADING
    obstacle = None if settings.transport == "gds" else _obstacle_to_cuda(places, settings)
    if obstacle:
        return None, obstacle
    devices = CudaDevices(settings)
    # As much again for what the engine makes of a tensor before it copies it. When a model that serves is given new
    # weights, the rest of the memory is taken already.
    free, needed = devices.free_bytes(devices.index(place)), 2 * int(settings.device_buffer_bytes)
    if free < needed:
        return None, f"{place} has {human_bytes(free)} free, and twice device_buffer_bytes is {human_bytes(needed)}"
    return place, None


def _obstacle_to_cuda(places: Collection[torch.device], settings: LoaderSettings) -> str | None:
    """Why bytes cannot be put on those of the devices that are CUDA's, if so."""
    devices = CudaDevices(settings)
    numbers = [devices.index(place) for place in places if place.type == "cuda"]
    return devices.obstacle() or next(filter(None, map(devices.obstacle_on, numbers)), None)


def _is_made_while_loading(model: torch.nn.Module) -> bool:
    """Whether the engine quantises weights as they come."""
    return any(getattr(getattr(part, "quant_method", None), "uses_meta_device", False) for part in model.modules())


def read_weights(
    weights: WeightFiles,
    settings: LoaderSettings,
    *,
    log: logging.Logger,
    show_progress: bool = True,
    skip: Callable[[str], bool] | None = None,
    note: str | None = None,
    direct: DirectLoad | None = None,
    device: torch.device | None = None,
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
        device=device,
    )


def is_first_rank() -> bool:
    """Whether this is the rank that speaks for all."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
