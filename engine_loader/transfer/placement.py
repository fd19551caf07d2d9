"""On which memory node a device is: the CPUs there reach it without crossing to another one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_SYS = Path("/sys")


def node_of_gpu(number: int, sys: Path = _SYS) -> int | None:
    """The memory node of torch's CUDA (or ROCm) device ``number``; None where nobody says."""
    import torch

    try:
        properties: Any = torch.cuda.get_device_properties(number)
        address = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    except (AttributeError, AssertionError, RuntimeError):  # an older torch, or none for this device
        return None
    return _node_at(sys / "bus/pci/devices" / "{:04x}:{:02x}:{:02x}.0".format(*address))


def node_of_storage(fd: int, sys: Path = _SYS) -> int | None:
    """The memory node of the disk with an open file; None where nobody says (a network, several disks)."""
    device = os.fstat(fd).st_dev
    return _node_at(sys / "dev/block" / f"{os.major(device)}:{os.minor(device)}")


def _node_at(device: Path) -> int | None:
    """What a device says, or the nearest that it belongs to."""
    try:
        real = device.resolve(strict=True)
    except OSError:
        return None
    for directory in (real, *real.parents):
        try:
            node = int((directory / "numa_node").read_text())
        except (OSError, ValueError):
            continue
        return node if node >= 0 else None
    return None
