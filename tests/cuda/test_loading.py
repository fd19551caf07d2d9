"""Loading into device memory, over the stand-in for the CUDA runtime, whose memory torch takes for the CPU's."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine_loader.errors import TransferCancelled, TransferError
from engine_loader.loading.checkpoint import Checkpoint
from engine_loader.loading.devices.cuda import CudaDevices
from engine_loader.loading.devices.trial import obstacle_on
from engine_loader.loading.direct.copies import copy_extents
from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.find import SafetensorsFiles
from engine_loader.loading.safetensors_store import SafetensorsStore
from engine_loader.loading.shards import open_files
from engine_loader.loading.sharing import NodeRanks
from engine_loader.loading.store import TensorStore
from engine_loader.loading.training.store import TrainingStore
from engine_loader.report.load_report import LoadReport
from engine_loader.report.progress import byte_progress
from engine_loader.settings import LoaderSettings, load_settings
from engine_loader.sources.posix import PosixSource
from engine_loader.transfer.device_stream import DeviceStream
from engine_loader.transfer.native.device_errors import obstacle_to_devices
from engine_loader.transfer.native.native_readers import NativeReaders
from engine_loader.transfer.plan import extent, make_extents
from tests.support.training_checkpoints import save_chunked

from .standin_devices import StandIn, StandInDevices

ROWS, COLUMNS = 600, 512
MIB = 1 << 20


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(ROWS, COLUMNS),
        "b": torch.randn(ROWS, COLUMNS),
        "half": torch.randn(COLUMNS, ROWS).to(torch.bfloat16),
        "nothing": torch.empty(0, 3),
        "scale": torch.tensor(3.0),
    }


@pytest.fixture
def path(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def settings_for(standin: StandIn, **options: object) -> LoaderSettings:
    small = {"device_pinned_bytes": "1MiB", "io_bytes": "64KiB", "threads": 2, "engine": "cpp"}
    return load_settings({**small, "device_runtime": str(standin.path), **options}).settings.loader


@contextmanager
def opened(path: Path, standin: StandIn, devices: StandInDevices, **options: object) -> Iterator[Checkpoint]:
    source = PosixSource()
    settings = settings_for(standin, **options)
    store = SafetensorsStore(open_files(source, SafetensorsFiles((str(path),))), source.name, settings, devices)
    with Checkpoint(store, torch.device("cpu")) as checkpoint:
        yield checkpoint


@pytest.fixture
def devices(standin: StandIn) -> StandInDevices:
    return StandInDevices(standin)


def test_load_into_fills_tensors_on_a_device_after_what_their_stream_was_doing(
    path: Path, tensors: dict[str, torch.Tensor], standin: StandIn, devices: StandInDevices
) -> None:
    standin.delay(500)
    wide = devices.tensor(ROWS, 2 * COLUMNS)
    turned = devices.tensor(COLUMNS, ROWS)
    targets = {
        "a": wide[:, COLUMNS:],
        "b": turned.t(),
        "half": devices.tensor(COLUMNS, ROWS, dtype=torch.bfloat16),
        "nothing": torch.empty(0, 3),
        "scale": torch.empty(()),  # in CPU memory
    }
    standin.fill(wide, 0x55)
    with opened(path, standin, devices) as checkpoint:
        checkpoint.load_into(targets)
    for name, target in targets.items():
        assert torch.equal(target, tensors[name]), name
    assert (wide[:, :COLUMNS].contiguous().view(torch.uint8) == 0x55).all()


def test_ranks_copy_to_a_device_what_one_of_them_read(
    path: Path,
    tensors: dict[str, torch.Tensor],
    standin: StandIn,
    devices: StandInDevices,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    standin.delay(500)
    settings = settings_for(standin, share="auto", read_mode="direct")
    source = PosixSource()
    stores, found = [], []
    with ExitStack() as stack:
        for rank in range(2):
            files = open_files(source, SafetensorsFiles((str(path),)))
            store = SafetensorsStore(files, source.name, settings, devices, NodeRanks(2))
            stores.append(stack.enter_context(store))
            (info,) = (info for info in store.infos if info.name == "half")
            target = devices.tensor(COLUMNS, ROWS // 2, dtype=torch.bfloat16)
            view = torch.empty(COLUMNS, ROWS, dtype=torch.bfloat16, device="meta").chunk(2, 1)[rank]
            extents = copy_extents(0, info.offset, view, target)
            assert extents is not None
            found.append((target, store.submit(extents, target, store.device_of(target))))
        for rank, (target, transfer) in enumerate(found):
            transfer.wait()
            assert torch.equal(target, tensors["half"].chunk(2, 1)[rank])
        members = [store._sharing._member for store in stores]
        read = sum(member.statistics().read_bytes for member in members if member is not None)
        assert read == tensors["half"].nbytes
    found.clear()


def test_an_error_of_a_copy_names_the_tensor(path: Path, standin: StandIn, devices: StandInDevices) -> None:
    targets = {"b": devices.tensor(ROWS, COLUMNS)}
    with opened(path, standin, devices) as checkpoint:
        standin.fail_copy(3)
        with pytest.raises(TransferError, match=r"tensor 'b': .*illegal memory access.*\(700\)") as failure:
            checkpoint.load_into(targets)
    assert failure.value.file == str(path)


def test_streamed_tensors_keep_their_memory_and_the_ring_its_bound(
    path: Path, tensors: dict[str, torch.Tensor], standin: StandIn
) -> None:
    standin.delay(300)
    devices = StandInDevices(standin, streaming=True)
    options = {"device_buffer_bytes": "2MiB", "block_bytes": "64KiB"}
    with opened(path, standin, devices, **options) as checkpoint:
        kept = dict(checkpoint.tensors())
        assert kept.keys() == tensors.keys()
        gc.collect()
        for name, tensor in kept.items():
            assert torch.equal(tensor, tensors[name]), name
            assert not tensor.nbytes or tensor.data_ptr() % 16 == 0
        del kept, tensor
        gc.collect()
        assert standin.live()["allocations"] == 0
        passed = StandInDevices(standin, streaming=True)
    with opened(path, standin, passed, **options) as checkpoint:
        for name, tensor in checkpoint.tensors():
            assert torch.equal(tensor, tensors[name])
    # Each of the large ones (1.2 MB) is a block; one may be there beside the budget, held by the loop above.
    assert passed.peak_bytes <= 2 * MIB + 2 * tensors["a"].nbytes


def test_a_stream_that_is_left_gives_everything_back(path: Path, standin: StandIn) -> None:
    standin.delay(2000)
    devices = StandInDevices(standin, streaming=True)
    with opened(path, standin, devices, block_bytes="64KiB") as checkpoint:
        for name, tensor in checkpoint.tensors():
            assert name and tensor is not None
            break
    del tensor
    gc.collect()
    assert standin.in_flight() == 0 and standin.live()["allocations"] == 0


class Model(nn.Module):
    def __init__(self, devices: StandInDevices) -> None:
        super().__init__()
        self.fused = nn.Parameter(devices.tensor(2 * ROWS, COLUMNS), requires_grad=False)
        self.part = nn.Parameter(devices.tensor(COLUMNS, ROWS // 2, dtype=torch.bfloat16), requires_grad=False)
        self.host = nn.Parameter(torch.zeros(ROWS, COLUMNS), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(()), requires_grad=False)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name == "a":
                self.fused.data[:ROWS].copy_(weight)
                self.host.data.copy_(weight)
            elif name == "b":
                self.fused.data.narrow(0, ROWS, ROWS).copy_(weight)
                self.fused.data[0].mul_(2)  # looks at what is on its way
            elif name == "half":
                self.part.data.copy_(weight.narrow(1, ROWS // 2, ROWS // 2))
            elif name == "scale":
                self.scale.data.copy_(weight)


def load_directly(path: Path, standin: StandIn, devices: StandInDevices, model: Model) -> DirectLoad:
    source = PosixSource()
    return load_through(
        SafetensorsStore(
            open_files(source, SafetensorsFiles((str(path),))), source.name, settings_for(standin), devices
        ),
        model,
    )


def load_through(reader: TensorStore, model: Model) -> DirectLoad:
    load = DirectLoad(model)
    with load:
        progress = byte_progress(1, "", shown=False)
        model.load_weights(load.tensors(reader, reader.infos, LoadReport(), progress=progress, log=lambda line: None))
    return load


def test_direct_mode_reads_a_training_checkpoint_into_parameters_on_a_device(
    tensors: dict[str, torch.Tensor], standin: StandIn, devices: StandInDevices, tmp_path: Path
) -> None:
    cut = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    save_chunked(cut, tmp_path / "step", lambda name, tensor: [[size // 3] for size in tensor.shape])
    standin.delay(500)
    model = Model(devices)
    load = load_through(TrainingStore(PosixSource(), str(tmp_path / "step"), settings_for(standin), devices), model)
    fused = torch.cat([tensors["a"], tensors["b"]])
    fused[0] *= 2
    assert torch.equal(model.fused, fused) and torch.equal(model.host, tensors["a"])
    assert torch.equal(model.part, tensors["half"][:, ROWS // 2 :]) and model.scale == 3.0
    assert load.materialised == {}


def test_direct_mode_reads_into_parameters_on_a_device(
    path: Path, tensors: dict[str, torch.Tensor], standin: StandIn, devices: StandInDevices
) -> None:
    standin.delay(500)
    model = Model(devices)
    standin.fill(model.fused, 0)
    load = load_directly(path, standin, devices, model)
    fused = torch.cat([tensors["a"], tensors["b"]])
    fused[0] *= 2
    assert torch.equal(model.fused, fused) and torch.equal(model.host, tensors["a"])
    assert torch.equal(model.part, tensors["half"][:, ROWS // 2 :]) and model.scale == 3.0
    assert load.recorded_bytes == 3 * tensors["a"].nbytes + model.part.nbytes
    assert load.materialised == {}


def test_direct_mode_names_the_tensor_whose_copy_failed(path: Path, standin: StandIn, devices: StandInDevices) -> None:
    standin.fail_copy(1)
    with pytest.raises(TransferError, match=r"tensor '\w+': .*illegal memory access"):
        load_directly(path, standin, devices, Model(devices))


@pytest.fixture
def readers(standin: StandIn) -> Iterator[NativeReaders]:
    readers = NativeReaders(2, block_bytes=64 << 10, pinned_bytes=MIB, device_runtime=str(standin.path))
    yield readers
    readers.close()


def submit_all(readers: NativeReaders, path: Path, target: torch.Tensor, owner: object) -> SimpleNamespace:
    file = PosixSource().open(str(path))
    plan = make_extents([extent(0, 0, file.size, target.data_ptr())])
    return SimpleNamespace(transfer=readers.submit_to_device([file], plan, DeviceStream(0), owner=owner), file=file)


def test_memory_under_a_copy_that_hangs_is_kept_until_it_ends(
    path: Path, standin: StandIn, readers: NativeReaders, devices: StandInDevices
) -> None:
    standin.hold_copies(True)
    target = devices.empty(path.stat().st_size, torch.device("cpu"))
    begun = submit_all(readers, path, target, target)
    while standin.in_flight() < 2:
        time.sleep(0.001)
    del target
    begun.transfer.cancel()
    gc.collect()
    assert standin.live()["allocations"] == 1
    with pytest.raises(TransferCancelled):
        standin.hold_copies(False)
        begun.transfer.wait()
    gc.collect()
    assert standin.live()["allocations"] == 0
    begun.file.close()


def test_an_reader_threads_that_is_closed_under_load_leaves_nothing(
    path: Path, standin: StandIn, readers: NativeReaders, devices: StandInDevices
) -> None:
    standin.delay(3000)
    target = devices.empty(path.stat().st_size, torch.device("cpu"))
    begun = submit_all(readers, path, target, target)
    while standin.in_flight() < 2:
        time.sleep(0.001)
    readers.close()
    assert standin.in_flight() == 0
    with pytest.raises(TransferError, match="cancelled"):
        begun.transfer.wait()
    begun.file.close()


def test_what_arrived_is_counted(path: Path, standin: StandIn, readers: NativeReaders, devices: StandInDevices) -> None:
    target = devices.empty(path.stat().st_size, torch.device("cpu"))
    begun = submit_all(readers, path, target, target)
    assert begun.transfer.wait()
    assert bytes(target.numpy()) == path.read_bytes()
    assert readers.statistics().bytes_read == readers.counters()["device_bytes"] == path.stat().st_size
    begun.file.close()


def test_without_a_runtime_there_is_an_obstacle_that_says_so(path: Path) -> None:
    obstacle = obstacle_to_devices("/nowhere/libcudart.so")
    assert obstacle is not None and "/nowhere/libcudart.so" in obstacle
    readers = NativeReaders(1, device_runtime="/nowhere/libcudart.so")
    with pytest.raises(TransferError, match="device_runtime"):
        submit_all(readers, path, torch.empty(0), None)
    readers.close()
    assert CudaDevices(load_settings({"engine": "python"}).settings.loader).obstacle() == "engine is set to python"
    cpu = CudaDevices(load_settings().settings.loader)
    assert cpu.number_of(torch.zeros(3)) is None and cpu.number(torch.device("cpu")) is None


def test_a_device_that_does_not_exist_is_reported(path: Path, standin: StandIn, readers: NativeReaders) -> None:
    file = PosixSource().open(str(path))
    with pytest.raises(TransferError, match=r"device 7 cannot be selected: invalid device ordinal \(101\)"):
        readers.submit_to_device([file], make_extents([]), DeviceStream(7))
    file.close()


class _Trial(StandInDevices):
    """A device whose memory can be looked at, or that gets ``wrong`` bytes wrong."""

    wrong = 0

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.clone()
        found[: self.wrong] ^= 1
        return found


def test_a_trial_of_a_device_on_which_all_is_well_says_nothing(standin: StandIn) -> None:
    assert obstacle_on(_Trial(standin), torch.device("cuda", 0), 0, settings_for(standin)) is None
    assert standin.live()["allocations"] == 0


def test_a_trial_finds_wrong_bytes(standin: StandIn) -> None:
    trial = _Trial(standin)
    trial.wrong = 3
    said = obstacle_on(trial, torch.device("cuda", 0), 0, settings_for(standin))
    assert said is not None and said.startswith("in a trial of cuda:0, 3 of ")


def test_a_trial_tells_of_copies_that_fail(standin: StandIn) -> None:
    standin.fail_copy(2)
    said = obstacle_on(_Trial(standin), torch.device("cuda", 0), 0, settings_for(standin))
    assert said is not None and "a trial of cuda:0 failed" in said and "the copy to the device failed" in said
