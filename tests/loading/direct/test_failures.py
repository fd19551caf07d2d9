"""How a load in direct mode fails: the error names the tensor, and nothing is left behind."""

import contextlib
import gc
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine_loader import TransferError
from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.find import SafetensorsFiles
from engine_loader.loading.safetensors_store import SafetensorsStore
from engine_loader.loading.shards import open_files
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from engine_loader.sources.posix import PosixSource
from tests.loading.direct.model import ROWS, Model
from tests.support.resources import left_open, open_resources


def test_an_error_names_the_tensor_and_nothing_is_left(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SafetensorsStore(
        open_files(PosixSource(), SafetensorsFiles((str(checkpoint),))), "posix", load_settings().settings.loader
    ) as reader:
        place = next(info.offset for info in reader.files.tensors if info.name == "b")
    before = open_resources()
    model = Model()
    with pytest.raises(TransferError, match=r"tensor 'b'"), DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        os.truncate(checkpoint, place + 100)
        model.weight.copy_(weights["b"])
    del weights, session
    gc.collect()
    assert left_open(before) == []


def test_an_error_of_the_engine_ends_the_load_and_gives_everything_back(checkpoint: Path) -> None:
    before = open_resources()
    model = Model()
    with pytest.raises(ZeroDivisionError), DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        model.weight.copy_(weights["a"])
        raise ZeroDivisionError
    assert left_open(before) == []


def test_an_error_that_the_engines_code_passes_over_still_ends_the_load(checkpoint: Path) -> None:
    model = Model()
    with pytest.raises(TransferError, match="tensor '"), DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        os.truncate(checkpoint, 500)
        with contextlib.suppress(Exception):
            model.weight.copy_(weights["a"] * 2)
        with contextlib.suppress(Exception):
            model.fused[:ROWS].copy_(weights["b"])
            model.fused.sum()


def test_a_cut_at_any_tensor_is_an_error_and_never_a_half_filled_model(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(70, 100) for number in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    with SafetensorsStore(
        open_files(PosixSource(), SafetensorsFiles((str(tmp_path / "model.safetensors"),))),
        "posix",
        load_settings().settings.loader,
    ) as reader:
        places = {info.name: info.offset for info in reader.files.tensors}
    for name, place in places.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        model = nn.ParameterDict({key: nn.Parameter(torch.full((70, 100), float("nan"))) for key in tensors})
        with pytest.raises(TransferError, match=f"tensor '{name}'"), DirectLoad(model) as session, torch.no_grad():
            weights = stream_weights([str(path)], load_settings().settings.loader, direct=session)
            for at, (key, weight) in enumerate(weights):
                if at == 0:
                    os.truncate(path, place + 5)
                model[key].copy_(weight)
