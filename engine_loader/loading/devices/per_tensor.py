"""Where streamed tensors are put when a model's parameters are on a GPU and in the CPU's memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch


class PerTensor:
    """Tells of each tensor of a checkpoint whether its parameter is in the CPU's memory (an offloaded embedding).

    Engines rename and fuse what is in a checkpoint, so a tensor is followed by the end of its module's name: the
    deepest module of the model whose name ends alike tells, if all its parameters are in one place. Where none does,
    the tensor goes to the GPU. A wrong guess costs a copy: engines copy a tensor into its parameter from anywhere.

    Args:
        device: the GPU.
        parameters: name and parameter of the model.
    """

    def __init__(self, device: torch.device, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.device = device
        self.type = device.type
        self._on_cpu: dict[tuple[str, ...], set[bool]] = defaultdict(set)
        for name, parameter in parameters:
            path = name.split(".")
            on_cpu = parameter.device.type == "cpu"
            for end in range(1, len(path) + 1):
                for begin in range(end):
                    self._on_cpu[tuple(path[begin:end])].add(on_cpu)

    def __str__(self) -> str:
        return f"{self.device}, or in CPU memory where their parameters are"

    def is_on_cpu(self, name: str) -> bool:
        """Whether the parameter of the checkpoint's tensor ``name`` is in the CPU's memory."""
        path = name.split(".")
        for end in range(len(path), 0, -1):
            places = self._of_ending(path[:end])
            if places is not None and len(places) == 1:
                return next(iter(places))
        return False

    def _of_ending(self, path: Sequence[str]) -> set[bool] | None:
        """Where the parameters are of what has the longest ending of ``path`` for its name.

        Of a single part only if it is all of the path: "weight" says nothing.
        """
        for begin in range(max(1, len(path) - 1)):
            places = self._on_cpu.get(tuple(path[begin:]))
            if places is not None:
                return places
        return None


TargetDevice: TypeAlias = torch.device | PerTensor | None
"""Where streamed tensors are put; None: in the CPU's memory."""


def is_on_cpu(target: TargetDevice, name: str) -> bool:
    """Whether the tensor ``name`` is put into the CPU's memory."""
    if isinstance(target, PerTensor):
        return target.is_on_cpu(name)
    return target is None or target.type == "cpu"


def gpu_of(target: TargetDevice) -> torch.device | None:
    """The device of those tensors that are not put into the CPU's memory."""
    return target.device if isinstance(target, PerTensor) else target
