"""Direct mode with random loaders: the model ends up as with real tensors."""

import contextlib
import unittest.mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings


def _some_view(draw: st.DataObject, tensor: torch.Tensor) -> torch.Tensor:
    """A random view of a tensor; the same choices on every kind of tensor."""
    for _ in range(draw.draw(st.integers(0, 3))):
        kind = draw.draw(st.sampled_from(["narrow", "select", "t", "flatten", "step", "unsqueeze", "chunk", "type"]))
        dims = tensor.dim()
        if kind == "type":
            if dims and tensor.dtype == torch.float32 and tensor.is_contiguous():
                tensor = tensor.view(torch.int32)
            continue
        if kind == "unsqueeze":
            tensor = tensor.unsqueeze(draw.draw(st.integers(0, dims)))
            continue
        if dims == 0:
            continue
        dim = draw.draw(st.integers(0, dims - 1))
        size = tensor.shape[dim]
        if kind == "narrow":
            begin = draw.draw(st.integers(0, size))
            tensor = tensor.narrow(dim, begin, draw.draw(st.integers(0, size - begin)))
        elif kind == "select" and size:
            tensor = tensor.select(dim, draw.draw(st.integers(0, size - 1)))
        elif kind == "t":
            tensor = tensor.transpose(dim, draw.draw(st.integers(0, dims - 1)))
        elif kind == "flatten":
            tensor = tensor.reshape(-1) if tensor.is_contiguous() else tensor
        elif kind == "step":
            tensor = tensor[(slice(None),) * dim + (slice(None, None, draw.draw(st.integers(1, 3))),)]
        elif kind == "chunk" and size:
            parts = tensor.chunk(draw.draw(st.integers(1, 4)), dim)
            tensor = parts[draw.draw(st.integers(0, len(parts) - 1))]
    return tensor


def _fitting(target: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of both that have one shape."""
    while weight.dim() > target.dim():
        if weight.shape[0] == 0:
            return target.reshape(-1)[:0], weight.reshape(-1)[:0]
        weight = weight.select(0, 0)
    while target.dim() > weight.dim():
        if target.shape[0] == 0:
            return target.reshape(-1)[:0], weight.reshape(-1)[:0]
        target = target.select(0, 0)
    for dim in range(weight.dim()):
        size = min(weight.shape[dim], target.shape[dim])
        weight, target = weight.narrow(dim, 0, size), target.narrow(dim, 0, size)
    return target, weight


def _step(draw: st.DataObject, targets: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    target = _some_view(draw, targets[draw.draw(st.integers(0, len(targets) - 1))])
    weight = _some_view(draw, weights[draw.draw(st.integers(0, len(weights) - 1))])
    kind = draw.draw(
        st.sampled_from(
            ["copy", "copy", "copy", "copy", "add", "fill", "write", "move", "index", "look", "cat", "data"]
        )
    )
    if kind == "fill":
        target.fill_(draw.draw(st.integers(-9, 9)))
    elif kind == "move":
        target, source = _fitting(target, _some_view(draw, targets[0]).clone())
        target.copy_(source)
    elif kind == "write" and weight.dtype == torch.float32:
        weight.mul_(2)
    elif kind == "look":
        target.fill_(int(weight.to(torch.int32).sum().item()) % 100)
    else:
        target, weight = _fitting(target, weight)
        if kind == "add":
            target.add_(weight.to(target.dtype))
        elif kind == "index" and target.dim():
            rows = torch.arange(target.shape[0]).flip(0)
            target[rows] = weight.to(target.dtype)
        elif kind == "cat" and target.dim():
            target.copy_(torch.cat([weight, weight])[: target.shape[0]])
        else:
            target.copy_(weight)


class _Replay:
    """The same random choices a second time."""

    def __init__(self, data: st.DataObject) -> None:
        self._data, self._made, self._at = data, list[object](), 0

    def again(self) -> "_Replay":
        self._at = 0
        return self

    def draw(self, strategy: st.SearchStrategy[object]) -> object:
        if self._at == len(self._made):
            self._made.append(self._data.draw(strategy))
        self._at += 1
        return self._made[self._at - 1]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_loaders_do_the_same_directly_and_streamed(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=1, max_size=4))
    sizes = data.draw(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=4))
    steps = data.draw(st.integers(1, 8))
    folder = tmp_path_factory.mktemp("random")
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.int32]
    weights = {
        f"w{number}": (torch.randn(shape, generator=generator) * 9).to(dtypes[number % 3])
        for number, shape in enumerate(shapes)
    }
    save_file(weights, folder / "model.safetensors")
    replay = _Replay(data)

    small_bytes = data.draw(st.sampled_from([0, 0, 256]))
    steps_between = data.draw(st.booleans())

    def run(direct: bool) -> list[torch.Tensor]:
        targets = [torch.full(size, -7, dtype=dtypes[number % 3]) for number, size in enumerate(sizes)]
        options = load_settings({"threads": 2}).settings.loader
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(DirectLoad(nn.Module())) if direct else None
            read = []
            for _, weight in stream_weights([str(folder / "model.safetensors")], options, direct=session):
                read.append(weight)
                if steps_between:
                    _step(replay, targets, read)  # type: ignore[arg-type]
            for _ in range(steps):
                _step(replay, targets, read)  # type: ignore[arg-type]
            del read, weight
        return targets

    with (
        unittest.mock.patch("engine_loader.loading.direct.load.SMALL_BYTES", small_bytes),
        unittest.mock.patch("engine_loader.loading.direct.load._LULL_TENSORS", 1),
    ):
        expected = run(False)
        replay.again()
        actual = run(True)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
