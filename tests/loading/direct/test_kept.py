"""Tensors that the engine's code keeps beyond a load in direct mode."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engine_loader import CheckpointError
from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from tests.loading.direct.model import COLUMNS, ROWS, Model


def test_a_kept_weight_works_after_the_load_and_without_the_file(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        kept = weights["a"][1:]
        del weights
    checkpoint.unlink()
    expected = torch.empty(ROWS - 1, COLUMNS).copy_(kept)
    assert torch.equal(kept + 0, expected)
    assert bool(torch.isfinite(expected).all())


def test_parameters_that_are_recording_tensors_stay_the_same_objects_with_their_attributes(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        model.weight = nn.Parameter(weights.pop("a"), requires_grad=False)
        model.weight.loader = "kept"
        model.tied = [model.weight]
        del weights
    assert type(model.weight) is nn.Parameter
    assert model.weight.loader == "kept"
    assert model.tied[0] is model.weight
    assert model.weight.data_ptr() != 0


def test_weights_that_are_asked_for_after_the_load_are_an_error(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session)
        next(weights)
    with pytest.raises(CheckpointError, match="after the load had ended"):
        next(weights)


def test_garbage_that_nobody_holds_is_not_read(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        cycle: list[object] = [weights.pop("a"), weights.pop("b"), weights.pop("turned")]
        cycle.append(cycle)
        del cycle, weights
    assert session.materialised == {}
