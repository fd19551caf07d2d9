"""The device that a caller names, checked before anything is opened."""

from __future__ import annotations

import torch

from ...errors import SettingsError


def usable_device(device: str | torch.device) -> torch.device:
    """The device that ``device`` is, or names.

    Raises:
        SettingsError: torch knows no such device, or has none of that kind, or none of that number, here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"device = {device!r}: {str(error).splitlines()[0]}") from None
    if found.type != "cuda":
        return found
    if torch.version.cuda is None and torch.version.hip is None:
        raise SettingsError(
            f"device = {str(device)!r}: torch {torch.__version__} is built for CPUs only; install a build for this "
            "machine's GPUs, or use device='cpu'"
        )
    count = torch.cuda.device_count()
    if not count:
        raise SettingsError(
            f"device = {str(device)!r}: torch sees no GPU here; look at nvidia-smi, CUDA_VISIBLE_DEVICES and the "
            "container's devices, or use device='cpu'"
        )
    if found.index is not None and found.index >= count:
        raise SettingsError(f"device = {str(device)!r}: torch sees {count} GPUs here, numbered from 0")
    return found
