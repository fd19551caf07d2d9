"""Checks GPUs: whether this package's copies to them work, and GPUDirect Storage."""

from __future__ import annotations

from collections.abc import Iterator

from ...settings import LoaderSettings, load_settings
from .finding import Finding

_AREA = "GPUs"


def check_gpus() -> Iterator[Finding]:
    """A trial copy to every device, and GPUDirect Storage.

    Raises:
        SettingsError: the settings cannot be read.
    """
    settings = load_settings().settings.loader
    yield from _copies(settings)
    yield _gds(settings)


def _copies(settings: LoaderSettings) -> Iterator[Finding]:
    import torch

    from ...loading.devices.cuda import CudaDevices

    if not torch.cuda.is_available():
        yield Finding(_AREA, "copies", "absent", "torch can use no GPU here")
        return
    devices = CudaDevices(settings)
    for number in range(torch.cuda.device_count()):
        obstacle = devices.obstacle() or devices.obstacle_on(number)
        name = f"copies to cuda:{number}"
        if obstacle is None:
            yield Finding(_AREA, name, "ok", "a trial copy arrived byte for byte")
        else:
            repair = "loads work, but more slowly: see docs/cuda.md and the setting device_runtime"
            yield Finding(_AREA, name, "warn", f"{obstacle}; torch copies instead", repair)


def _gds(settings: LoaderSettings) -> Finding:
    from ...loading.streaming.gds import HINT, obstacle_to_gds

    name = "GPUDirect Storage"
    obstacle = obstacle_to_gds(0)
    if obstacle is None:
        return Finding(_AREA, name, "ok", "can be used on device 0; a file system may still refuse it")
    if settings.transport == "gds":
        return Finding(_AREA, name, "fail", f"transport is gds, and {obstacle}", HINT)
    return Finding(_AREA, name, "absent", f"cannot be used, and is not requested: {obstacle}")
