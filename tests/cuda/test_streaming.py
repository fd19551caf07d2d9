"""Streaming for an engine: where tensors are handed over, why, and that they lie on the device (a stand-in's)."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine_loader.engines.common import mode, reading
from engine_loader.errors import SettingsError
from engine_loader.loading import safetensors_store as reader
from engine_loader.loading.devices.per_tensor import PerTensor
from engine_loader.settings import LoaderSettings, load_settings
from tests.support.tiny_models import make_model

from .standin_devices import StandIn, StandInDevices

MIB, GIB = 1 << 20, 1 << 30
CUDA = torch.device("cuda", 0)


class _Devices:
    """What the adapter asks of torch's devices."""

    def __init__(self, settings: LoaderSettings) -> None:
        self.free = 80 * GIB
        self.wrong: str | None = None

    def index(self, device: torch.device) -> int:
        return device.index or 0

    def obstacle(self) -> str | None:
        return None

    def obstacle_on(self, number: int) -> str | None:
        return self.wrong

    def free_bytes(self, number: int) -> int:
        return self.free


def model_on(*places: str, online: bool = False) -> Any:
    """What is asked of a model."""
    part = SimpleNamespace(quant_method=SimpleNamespace(uses_meta_device=online))
    parameters = {f"layers.{n}.weight": SimpleNamespace(device=torch.device(place)) for n, place in enumerate(places)}
    return SimpleNamespace(parameters=parameters.values, named_parameters=parameters.items, modules=lambda: [part])


def plan(
    monkeypatch: pytest.MonkeyPatch, model: Any, *, free: int = 80 * GIB, wrong: str | None = None, **options: Any
) -> Any:
    def devices(settings: LoaderSettings) -> _Devices:
        made = _Devices(settings)
        made.free, made.wrong = free, wrong
        return made

    monkeypatch.setattr(mode, "CudaDevices", devices)
    return mode.plan_mode(load_settings(options).settings.loader, model)


def test_a_model_on_a_gpu_is_handed_tensors_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, model_on("cuda:0", "cuda:0"), mode="stream") == (False, None, CUDA)
    # And when a load in direct mode turns out to be better streamed.
    assert plan(monkeypatch, model_on("cuda:0")) == (True, None, CUDA)


def test_a_model_in_cpu_memory_is_handed_them_there_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, model_on("cpu"), mode="stream") == (False, None, None)


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (model_on("cuda:0"), {"stream_device": "cpu"}, "stream_device is cpu"),
        (model_on("cuda:0", "cuda:1"), {}, "parameters are on cuda:0, cuda:1"),
        (model_on("cuda:0", "cuda:1", "cpu"), {}, "parameters are on cpu, cuda:0, cuda:1"),
        (model_on("cuda:0", "meta"), {}, "parameters are on cuda:0, meta"),
        (model_on("cuda:0", online=True), {}, "weights are quantised, or their memory made, while they are loaded"),
        (model_on("cuda:0"), {"wrong": "a trial of cuda:0 failed"}, "a trial of cuda:0 failed"),
        (model_on("cuda:0"), {"free": GIB}, "cuda:0 has 1.00 GiB free, and twice device_buffer_bytes is 2.00 GiB"),
    ],
)
def test_what_speaks_against_the_device_is_said(
    model: Any, options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (False, f"handed over in CPU memory: {why}", None)
    assert plan(monkeypatch, model, mode="stream", **options) == expected
    if "wrong" not in options:
        with pytest.raises(SettingsError, match="transport: gds cannot serve here"):
            plan(monkeypatch, model, mode="stream", transport="gds", **options)


def test_gpudirect_storage_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(monkeypatch, model_on("cuda:0"), transport="gds", wrong="a trial of cuda:0 failed")
    assert planned == (False, "streamed: transport: gds reads whole tensors", CUDA)
    with pytest.raises(SettingsError, match="mode: direct cannot serve here: transport: gds reads whole tensors"):
        plan(monkeypatch, model_on("cuda:0"), transport="gds", mode="direct")


@pytest.fixture
def devices(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandInDevices:
    """In place of torch's."""
    standin.delay(300)
    made = StandInDevices(standin, streaming=True)
    monkeypatch.setattr(reader, "CudaDevices", lambda settings: made)
    return made


def options_for(standin: StandIn) -> dict[str, object]:
    small = {"device_pinned_bytes": "1MiB", "device_buffer_bytes": "2MiB", "block_bytes": "256KiB", "io_bytes": "64KiB"}
    return {**small, "device_runtime": str(standin.path), "engine": "cpp", "mode": "stream"}


def test_an_engine_is_handed_tensors_in_the_devices_memory(
    devices: StandInDevices, standin: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {f"layers.{number}.weight": torch.randn(300, 500) for number in range(20)}
    save_file(expected, tmp_path / "model.safetensors")
    settings = load_settings(options_for(standin)).settings.loader
    log = logging.getLogger("engine_loader.test")
    with caplog.at_level(logging.INFO):
        weights = reading.read_weights(
            [str(tmp_path / "model.safetensors")], settings, log=log, show_progress=False, device=CUDA
        )
        names = set()
        for name, tensor in weights:
            assert devices.number_of(tensor) == 0, f"{name} is not on the device"
            assert torch.equal(tensor, expected[name])
            names.add(name)
    assert names == expected.keys()
    assert "handed over on cuda:0" in caplog.text
    del tensor
    gc.collect()
    assert standin.live()["allocations"] == 0
    # Tensors of 600 kB are blocks of their own; one may be there beside the budget, held by the loop above.
    assert devices.peak_bytes <= 2 * MIB + 2 * 600_000


@pytest.mark.parametrize("mode_of_model", ["stream", "auto"])
def test_each_tensor_goes_to_where_its_parameter_is(mode_of_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(monkeypatch, model_on("cuda:0", "cpu", "cuda:0"), mode=mode_of_model)
    assert planned.note is None
    places = [planned.device.is_on_cpu(f"model.layers.{number}.weight") for number in range(3)]
    assert places == [False, True, False]
    # GPUDirect Storage has no way into the CPU's memory.
    with pytest.raises(SettingsError, match="transport: gds cannot serve here: parameters are on cpu, cuda:0"):
        plan(monkeypatch, model_on("cuda:0", "cpu"), transport="gds")


@pytest.mark.parametrize(
    ("name", "on_cpu"),
    [
        ("model.embed_tokens.weight", True),
        ("language_model.model.embed_tokens.weight", True),  # the checkpoint has a prefix
        ("embed_tokens.weight", True),  # or lacks one
        ("model.layers.3.engram.embed.scale", True),  # another parameter of an offloaded module
        ("model.layers.3.engram.shards.0.weight", True),  # a part of what is one there
        ("model.layers.0.mlp.up_proj.weight", False),  # fused, beside others on the GPU
        ("model.layers.3.mlp.up_proj.weight", False),
        ("visual.patch.weight", False),
        ("weight", False),
    ],
)
def test_names_that_an_engine_changes_are_followed_by_their_modules(name: str, on_cpu: bool) -> None:
    memory, gpu = torch.empty(1), SimpleNamespace(device=CUDA)
    parameters: Any = {
        "model.embed_tokens.weight": memory,
        "model.layers.0.mlp.gate_up_proj.weight": gpu,
        "model.layers.3.engram.embed.weight": memory,
        "model.layers.3.mlp.gate_up_proj.weight": gpu,
        "lm_head.weight": gpu,
    }
    assert PerTensor(CUDA, parameters.items()).is_on_cpu(name) is on_cpu


@pytest.mark.parametrize("engine", ["cpp", "python"])
def test_offloaded_tensors_are_handed_over_in_cpu_memory_and_the_others_on_the_device(
    engine: str, devices: StandInDevices, standin: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {f"layers.{number}.weight": torch.randn(300, 50) for number in range(20)}
    save_file(expected, tmp_path / "model.safetensors")
    settings = load_settings({**options_for(standin), "engine": engine}).settings.loader
    # Python's threads leave it to torch to copy to a device, and there is no CUDA here.
    gpu = CUDA if engine == "cpp" else torch.device("meta")
    places = {name: expected[name] if number % 3 == 0 else None for number, name in enumerate(expected)}
    parameters = {name: SimpleNamespace(device=gpu) if place is None else place for name, place in places.items()}
    log = logging.getLogger("engine_loader.test")
    with caplog.at_level(logging.INFO):
        files = [str(tmp_path / "model.safetensors")]
        target = PerTensor(gpu, parameters.items())  # type: ignore[arg-type]
        for name, tensor in reading.read_weights(files, settings, log=log, show_progress=False, device=target):
            on_device = devices.number_of(tensor) == 0 if engine == "cpp" else tensor.is_meta
            assert on_device is (places[name] is None), name
            assert tensor.is_meta or torch.equal(tensor, expected.pop(name))
    assert "or in CPU memory where their parameters are" in caplog.text


def test_without_a_device_they_are_in_cpu_memory(
    devices: StandInDevices, standin: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"a": torch.arange(100_000.0)}, tmp_path / "model.safetensors")
    settings = load_settings(options_for(standin)).settings.loader
    log = logging.getLogger("engine_loader.test")
    note = "handed over in CPU memory: stream_device is cpu"
    with caplog.at_level(logging.INFO):
        files = [str(tmp_path / "model.safetensors")]
        weights = dict(reading.read_weights(files, settings, log=log, show_progress=False, note=note))
    assert devices.number_of(weights["a"]) is None and devices.peak_bytes == 0
    assert note in caplog.text


@pytest.mark.engine
@pytest.mark.parametrize("arch", ["llama", "qwen3-moe"])
def test_vllm_fills_a_model_from_tensors_on_the_device(
    arch: str, devices: StandInDevices, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_loader.engines.vllm import loader as vllm
    from tests.support.vllm_inprocess import differences, load_state

    model = make_model(arch, tmp_path)
    (expected,) = load_state(model, "auto")
    monkeypatch.setattr(vllm, "plan_mode", lambda settings, model: mode.LoadPlan(False, None, CUDA))
    (state,) = load_state(model, "b10_3fs", options_for(standin))
    assert differences(expected, state) == []
    assert devices.peak_bytes > 0
    gc.collect()
    assert standin.live()["allocations"] == 0
