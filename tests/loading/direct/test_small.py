"""Small tensors in direct mode are read whole, ahead of the engine's code, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.direct.recording import RecordingTensor
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from tests.loading.direct.model import COLUMNS, ROWS, Model, Weights


class _Lull:
    """A load of a large tensor, many small ones, and a large one."""

    def __init__(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(1)
        self.small = {f"small.{number:03}": torch.randn(8, generator=generator) for number in range(300)}
        self.large = {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in ("a", "z")}
        self.lines: list[str] = []
        self._files = []
        # Each kind in a file of its own, for safetensors puts a file's tensors into an order of its own.
        for number, tensors in enumerate(({"a": self.large["a"]}, self.small, {"z": self.large["z"]})):
            self._files.append(str(tmp_path / f"model-{number}.safetensors"))
            save_file(tensors, self._files[-1])

    def weights(self, session: DirectLoad) -> Weights:
        settings = load_settings({"mode": "direct"}).settings.loader
        return stream_weights(self._files, settings, direct=session, tell=self.lines.append)


def test_what_was_copied_before_many_small_tensors_is_there_among_them(tmp_path: Path) -> None:
    lull, target = _Lull(tmp_path), torch.full((ROWS, COLUMNS), float("nan"))
    seen = []
    with DirectLoad(nn.Module()) as session:
        for name, weight in lull.weights(session):
            if name in ("a", "z"):
                assert type(weight) is RecordingTensor
                target.copy_(weight)
            else:
                assert torch.equal(weight, lull.small[name])
                seen.append(float(target[0, 0]))
    assert seen == [float(lull.large["a"][0, 0])] * 300
    assert torch.equal(target, lull.large["z"])


def test_a_tensor_kept_from_before_is_copied_among_many_small_ones(tmp_path: Path) -> None:
    lull, target = _Lull(tmp_path), torch.full((ROWS, COLUMNS), float("nan"))
    with DirectLoad(nn.Module()) as session:
        for name, weight in lull.weights(session):
            if name == "a":
                kept = weight
            elif name == "small.100":
                target.copy_(kept)
                assert torch.equal(target + 0, lull.large["a"])
                target.t().copy_(weight.repeat(ROWS * COLUMNS // 8).view(COLUMNS, ROWS))
        del kept, weight
    assert torch.equal(target.t().reshape(-1, 8)[5], lull.small["small.100"])


def test_a_mode_that_the_engine_puts_on_among_small_tensors_does_no_harm(tmp_path: Path) -> None:
    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls += 1
            return func(*args, **(kwargs or {}))

    lull, target = _Lull(tmp_path), torch.full((ROWS, COLUMNS), float("nan"))
    with DirectLoad(nn.Module()) as session:
        weights = lull.weights(session)
        for _ in range(100):
            next(weights)
        with Counting() as mode:
            for name, weight in weights:
                if name == "z":
                    target.copy_(weight)
        assert mode.calls
        target.add_(1)
    assert torch.equal(target, lull.large["z"] + 1)
    assert "dispatch mode of its own" in lull.lines[0]


def test_very_many_small_tensors_are_streamed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_loader.loading.weights._MANY_TENSORS", 2)
    lines: list[str] = []
    for mode, kind in (("auto", torch.Tensor), ("direct", RecordingTensor)):
        settings = load_settings({"mode": mode}).settings.loader
        model = Model()
        with DirectLoad(model) as session, torch.no_grad():
            weights = dict(stream_weights([str(checkpoint)], settings, direct=session, tell=lines.append))
            assert type(weights["a"]) is kind
            model.weight.copy_(weights["a"])
        assert bool(torch.isfinite(model.weight).all())
    assert "streamed: 3 tensors this small" in lines[0]
    assert "streamed" not in lines[1]
