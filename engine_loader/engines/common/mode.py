"""How a model is loaded: in direct mode or streamed, and on which device streamed tensors are handed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...errors import SettingsError
from ...loading.devices.cuda import CudaDevices
from ...loading.devices.per_tensor import PerTensor, TargetDevice
from ...report.load_report import human_bytes
from ...settings import LoaderSettings

_MADE_WHILE_LOADING = "weights are quantised, or their memory made, while they are loaded"


class LoadPlan(NamedTuple):
    """How a model is loaded.

    Attributes:
        directly: in direct mode.
        note: why the weights are streamed, and why they are handed over in the CPU's memory, where there is a reason.
        device: where streamed tensors are handed over; None: in the CPU's memory.
    """

    directly: bool
    note: str | None
    device: TargetDevice


@dataclass(frozen=True)
class _Transport:
    """What a value of the setting ``transport`` means for the choice of the mode.

    Attributes:
        obstacle_to_direct: why direct mode cannot serve with it; None where it can.
        copies_to_device: bytes reach a GPU by the copies of ``CudaDevices``, so that obstacles to these count.
        device_required: it is an error if streamed tensors cannot be handed over on the model's GPU.
    """

    obstacle_to_direct: str | None = None
    copies_to_device: bool = True
    device_required: bool = False


_TRANSPORTS: Mapping[str, _Transport] = {
    "auto": _Transport(),
    "gds": _Transport("transport: gds reads whole tensors", copies_to_device=False, device_required=True),
}


def plan_mode(settings: LoaderSettings, model: torch.nn.Module) -> LoadPlan:
    """How ``model`` is loaded.

    Raises:
        SettingsError: direct mode, or GPUDirect Storage, was asked for and cannot serve.
    """
    obstacle = None if settings.mode == "stream" else obstacle_to_direct(model, settings)
    if obstacle and settings.mode == "direct":
        raise SettingsError(f"mode: direct cannot serve here: {obstacle}; set mode to auto or stream")
    directly = settings.mode != "stream" and not obstacle
    device, why = _device_of_streamed(model, settings)
    if why and _TRANSPORTS[settings.transport].device_required:
        raise SettingsError(f"transport: {settings.transport} cannot serve here: {why}; set transport to auto")
    notes = [f"streamed: {obstacle}"] if obstacle else []
    if why and not directly:
        notes.append(f"handed over in CPU memory: {why}")
    return LoadPlan(directly, "; ".join(notes) or None, device)


def obstacle_to_direct(model: torch.nn.Module, settings: LoaderSettings) -> str | None:
    """Why this model cannot be loaded in direct mode; None if it can."""
    obstacle = _TRANSPORTS[settings.transport].obstacle_to_direct
    if obstacle:
        return obstacle
    devices = _devices_of(model)
    kinds = {device.type for device in devices}
    if kinds - {"cpu", "cuda", "meta"}:
        return f"parameters are on {', '.join(sorted(kinds - {'cpu'}))}"
    if "cuda" in kinds:
        obstacle = _obstacle_to_cuda(devices, settings)
        if obstacle:
            return f"parameters are on cuda, and {obstacle}"
    if _is_made_while_loading(model) or "meta" in kinds:
        return _MADE_WHILE_LOADING
    return None


def _device_of_streamed(model: torch.nn.Module, settings: LoaderSettings) -> tuple[TargetDevice, str | None]:
    """The device where streamed tensors are handed over; None: in the CPU's memory, and why, for a model on a GPU."""
    devices = _devices_of(model)
    gpu = next((device for device in devices if device.type == "cuda"), None)
    if gpu is None:
        return None, None
    if settings.stream_device == "cpu":
        return None, "stream_device is cpu"
    mixed = len(devices) > 1
    if mixed and (devices - {gpu, torch.device("cpu")} or _TRANSPORTS[settings.transport].device_required):
        return None, f"parameters are on {', '.join(sorted(map(str, devices)))}"
    if _is_made_while_loading(model):
        return None, _MADE_WHILE_LOADING
    if _TRANSPORTS[settings.transport].copies_to_device:
        obstacle = _obstacle_to_cuda(devices, settings)
        if obstacle:
            return None, obstacle
    cuda = CudaDevices(settings)
    # As much again for what the engine makes of a tensor before it copies it. When a model that serves is given new
    # weights, the rest of the memory is taken already.
    free, needed = cuda.free_bytes(cuda.index(gpu)), 2 * int(settings.device_buffer_bytes)
    if free < needed:
        return None, f"{gpu} has {human_bytes(free)} free, and twice device_buffer_bytes is {human_bytes(needed)}"
    return PerTensor(gpu, model.named_parameters()) if mixed else gpu, None


def _devices_of(model: torch.nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}


def _obstacle_to_cuda(devices: Collection[torch.device], settings: LoaderSettings) -> str | None:
    """Why bytes cannot be copied to the CUDA devices among ``devices``; None if they can."""
    cuda = CudaDevices(settings)
    numbers = [cuda.index(device) for device in devices if device.type == "cuda"]
    return cuda.obstacle() or next(filter(None, map(cuda.obstacle_on, numbers)), None)


def _is_made_while_loading(model: torch.nn.Module) -> bool:
    """True if the engine quantises weights while they are loaded, or makes the memory for them then."""
    return any(getattr(getattr(part, "quant_method", None), "uses_meta_device", False) for part in model.modules())
