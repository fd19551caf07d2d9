"""GPUDirect Storage: when it refuses and what it says, and the path itself over stand-ins (gds_scenarios.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import open_checkpoint
from engine_loader.cli.diagnosis.gpus import check_gpus
from engine_loader.errors import EngineLoaderError, SettingsError
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from tests.support.training_checkpoints import save_chunked

from .building import compile_cufile
from .gds_scenarios import SCENARIOS

pytest.importorskip("fastsafetensors")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_cufile(tmp_path_factory.mktemp("cufile"))


def rehearse(library: Path, folder: Path, scratch: Path, names: Iterable[str]) -> tuple[dict[str, str], str]:
    """What came of each scenario, and what was said."""
    command = [sys.executable, "-m", "tests.cuda.gds_scenarios", str(library), str(scratch), *names]
    environ = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280, check=False)
    lines = [line.partition(": ") for line in done.stdout.splitlines()]
    return {name: outcome for name, _, outcome in lines}, done.stderr


@pytest.fixture(scope="module")
def rehearsed(library: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    return rehearse(library, library.parent, tmp_path_factory.mktemp("gds"), SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_over_the_stand_ins(scenario: str, rehearsed: tuple[dict[str, str], str]) -> None:
    outcomes, said = rehearsed
    assert outcomes.get(scenario) == "ok", said


def test_without_cufile_it_says_so(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "libraries"
    folder.mkdir()
    (folder / library.name).symlink_to(library)
    outcomes, said = rehearse(library, folder, tmp_path, ["without_cufile_it_says_so"])
    assert outcomes == {"without_cufile_it_says_so": "ok"}, said


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(10.0)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def refusal(path: Path, **options: object) -> str:
    """What reading all of a checkpoint says when GPUDirect Storage is asked for."""
    with pytest.raises(SettingsError) as failure, open_checkpoint(path, transport="gds", **options) as checkpoint:  # type: ignore[arg-type]
        list(checkpoint.tensors())
    return str(failure.value)


def test_tensors_for_the_cpu_are_refused(path: Path) -> None:
    assert refusal(path) == (
        "transport: gds cannot serve here: these tensors go to 'cpu', not to a CUDA device; set transport to auto"
    )
    with (
        pytest.raises(SettingsError, match="these tensors are in the CPU's memory"),
        open_checkpoint(path, transport="gds") as checkpoint,
    ):
        checkpoint.load_into({"a": torch.empty(10)})
    settings = load_settings({"transport": "gds"}).settings.loader
    with pytest.raises(SettingsError, match="transport: gds cannot serve here"):
        list(stream_weights([str(path)], settings))


def test_files_that_are_not_local_are_refused(path: Path) -> None:
    said = refusal(Path("m.safetensors"), files={"m.safetensors": path.read_bytes()}, device="cuda")
    assert "m.safetensors is read by memory" in said


def test_training_checkpoints_are_refused(tmp_path: Path) -> None:
    save_chunked({"a": torch.arange(16.0)}, tmp_path / "step", lambda name, tensor: [])
    assert "is a training checkpoint" in refusal(tmp_path / "step", device="cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be GPUDirect Storage here")
def test_where_there_is_no_gpu_it_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fastsafetensors finds no GPU by libcudart.so" in refusal(path, device="cuda:0")
    (finding,) = [finding for finding in check_gpus() if finding.name == "GPUDirect Storage"]
    assert finding.status == "ok" and "is not asked for: fastsafetensors finds no GPU" in finding.value
    monkeypatch.setenv("ENGINE_LOADER_LOADER__TRANSPORT", "gds")
    (finding,) = [finding for finding in check_gpus() if finding.name == "GPUDirect Storage"]
    assert finding.status == "fail" and finding.repair == "set transport to auto"


def test_without_fastsafetensors_it_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastsafetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastsafetensors", None)
    assert "fastsafetensors cannot be imported" in refusal(path, device="cuda:0")


def test_the_setting_takes_nothing_else() -> None:
    with pytest.raises(EngineLoaderError, match="'auto' or 'gds'"):
        load_settings({"transport": "cufile"})
