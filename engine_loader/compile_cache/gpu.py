"""Which GPUs this process would see, without initialising CUDA: by NVIDIA's management library, or by the kernel's
list for AMD.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

_KFD = Path("/sys/class/kfd/kfd/topology/nodes")
_NAME_BYTES = 96
_UUID_BYTES = 96


class Gpu(NamedTuple):
    """A GPU's name, its compute capability ("9.0", or "gfx942") and its unique id (empty where there is none)."""

    name: str
    capability: str
    uuid: str = ""


@cache
def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES (or ROCm's variables) leaves visible; empty where there are none."""
    found = list(_nvidia_gpus())
    if found:
        return _filtered(found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return _filtered(list(_amd_gpus()), os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("ROCR_VISIBLE_DEVICES")))


def _filtered(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    if visible is None:
        return gpus
    chosen = []
    for entry in filter(None, (text.strip() for text in visible.split(","))):
        if entry.isdigit() and int(entry) < len(gpus):
            chosen.append(gpus[int(entry)])
        elif named := [gpu for gpu in gpus if gpu.uuid and gpu.uuid.startswith(entry)]:
            chosen += named[:1]
        elif entry.startswith("MIG-"):  # a slice: named by its own id, of some GPU of this machine
            chosen += gpus[:1]
        else:
            break  # as CUDA: what follows an entry that does not exist is not seen
    return chosen


@cache
def cuda_driver_version() -> str:
    """The version of CUDA that NVIDIA's driver implements: "13.0"; "none" without a driver."""
    with _nvml() as nvml:
        version = ctypes.c_int()
        if nvml is None or nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) != 0:
            return "none"
        return f"{version.value // 1000}.{version.value % 1000 // 10}"


@contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    """NVIDIA's management library, initialised; None where there is none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        works = nvml.nvmlInit_v2() == 0
    except (OSError, AttributeError):
        works = False
    if not works:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _nvidia_gpus() -> Iterator[Gpu]:
    with _nvml() as nvml:
        if nvml is None:
            return
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
                continue
            name, uuid = ctypes.create_string_buffer(_NAME_BYTES), ctypes.create_string_buffer(_UUID_BYTES)
            major, minor = ctypes.c_int(), ctypes.c_int()
            nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES))
            nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(_UUID_BYTES))
            nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
            yield Gpu(
                name.value.decode(errors="replace"), f"{major.value}.{minor.value}", uuid.value.decode(errors="replace")
            )


def _amd_gpus() -> Iterator[Gpu]:
    try:
        nodes = sorted(_KFD.iterdir(), key=lambda node: int(node.name))
    except (OSError, ValueError):
        return
    for node in nodes:
        try:
            lines = (node / "properties").read_text().splitlines()
            name = (node / "name").read_text().strip()
        except OSError:
            continue
        properties = dict(line.split(" ", 1) for line in lines if " " in line)
        version = int(properties.get("gfx_target_version", "0"))
        if version:  # CPUs are nodes too, with version 0
            yield Gpu(name or "AMD", f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}")
