"""A model whose parameters are filled with NaN, and what it holds after a load."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.direct.recording import RecordingTensor
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings

ROWS, COLUMNS = 96, 160
Weights = Iterator[tuple[str, torch.Tensor]]
Load = Callable[[nn.Module, dict[str, torch.Tensor]], object]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # All of it NaN: what a loader leaves out shows.
        self.weight = nn.Parameter(torch.full((ROWS, COLUMNS), float("nan")), requires_grad=False)
        self.fused = nn.Parameter(torch.full((2 * ROWS, COLUMNS), float("nan")), requires_grad=False)
        self.columns = nn.Parameter(torch.full((ROWS, COLUMNS // 2), float("nan")), requires_grad=False)
        self.turned = nn.Parameter(torch.full((COLUMNS, ROWS), float("nan")), requires_grad=False)
        self.low = nn.Parameter(torch.full((ROWS, COLUMNS), float("nan"), dtype=torch.bfloat16), requires_grad=False)
        self.kept: list[torch.Tensor] = []


def after(load: Load, checkpoint: Path, *, direct: bool, **options: object) -> dict[str, torch.Tensor]:
    """What the model holds after a load, and that it holds nothing but real tensors."""
    model = Model()
    settings = load_settings(options).settings.loader
    if direct:
        with DirectLoad(model) as session, torch.no_grad():
            load(model, dict(stream_weights([str(checkpoint)], settings, direct=session)))
    else:
        with torch.no_grad():
            load(model, dict(stream_weights([str(checkpoint)], settings)))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state |= {f"kept.{number}": tensor for number, tensor in enumerate(model.kept)}
    assert not [name for name, tensor in state.items() if type(tensor) is RecordingTensor]
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def same(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.nan_to_num(nan=-77.0), actual[name].nan_to_num(nan=-77.0)), name
