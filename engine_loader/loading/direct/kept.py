"""Recording tensors that the engine's code kept beyond the load: real tensors take their place."""

from __future__ import annotations

import contextlib
import gc
import weakref

import torch

from .recording import Origin, RecordingTensor, reason
from .torch_private import attributes_of, parameters_of


def replace_recording_tensors(module: torch.nn.Module) -> list[str]:
    """Put real tensors in place of recording ones among a module's parameters, buffers and attributes.

    Returns:
        Their names, as in ``named_parameters``.
    """
    replaced: list[str] = []
    made: dict[int, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for holder in attributes_of(part):
            for name, value in list(holder.items()):
                if type(value) is not RecordingTensor:
                    continue
                real = made.get(id(value))
                if real is None:
                    real = value.materialise(shared=True)
                    if holder is parameters_of(part):
                        real = torch.nn.Parameter(real, requires_grad=value.requires_grad)
                    made[id(value)] = real
                holder[name] = real
                replaced.append(f"{prefix}.{name}" if prefix else name)
    return replaced


class LiveOrigins:
    """Origins of which recording tensors still exist."""

    def __init__(self) -> None:
        self._origins: weakref.WeakSet[Origin] = weakref.WeakSet()

    def add(self, origin: Origin) -> None:
        """Watch an origin, without keeping it alive."""
        self._origins.add(origin)

    def make_real(self) -> None:
        """Read the tensors of the origins that are still alive, and turn their recording tensors, wherever they are
        held, into real ones.

        Raises:
            CheckpointError: a tensor could not be read.
        """
        if not self._origins:
            return
        reason.text = "it was kept"
        gc.collect()  # so that garbage is not read
        for origin in list(self._origins):
            origin.whole()
        # Torch refuses a tensor of which views exist, so views come first.
        turned = True
        while turned:
            turned = False
            for kept in [found for found in gc.get_objects() if type(found) is RecordingTensor]:
                if kept.origin in self._origins:
                    # What torch refuses to swap goes on working through its origin's data.
                    with contextlib.suppress(RuntimeError):
                        kept.become_real()
                        turned = True
