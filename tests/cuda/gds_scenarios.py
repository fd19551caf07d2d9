"""GPUDirect Storage by fastsafetensors, over the stand-ins for the CUDA runtime and for cuFile.

fastsafetensors loads its libraries once, and takes this for a machine with a GPU from then on: so in a process of their
own.

    LD_LIBRARY_PATH=FOLDER python -m tests.cuda.gds_scenarios FOLDER/libcudart.so SCRATCH SCENARIO...
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine_loader.errors import SettingsError, TransferError
from engine_loader.loading.checkpoint import Checkpoint
from engine_loader.loading.find import SafetensorsFiles
from engine_loader.loading.safetensors_store import SafetensorsStore
from engine_loader.loading.shards import open_files
from engine_loader.loading.streaming import gds
from engine_loader.report.load_report import LoadReport
from engine_loader.settings import load_settings
from engine_loader.sources.posix import PosixSource

from .standin_devices import StandIn, StandInDevices

MIB = 1 << 20
ROWS, COLUMNS = 700, 512
PLACE = torch.device("cuda", 0)  # whose memory is the stand-in's
SMALL = {"device_buffer_bytes": "2MiB", "block_bytes": "256KiB"}


class _Live(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("drivers", "handles", "registered"))


class Rehearsal:
    """A checkpoint of two files and where it is loaded from and to."""

    def __init__(self, library: Path, scratch: Path) -> None:
        self.standin = StandIn(library)
        self.cufile = ctypes.CDLL(str(library))
        self.cufile.cufile_bytes.restype = ctypes.c_uint64
        self.node = scratch / "nvidia-fs0"
        torch.manual_seed(0)
        self.tensors = {f"layers.{number}.weight": torch.randn(ROWS, COLUMNS) for number in range(6)}
        self.tensors |= {
            "a_scale": torch.tensor(3.0),
            "bytes": torch.arange(77_777, dtype=torch.int32).to(torch.uint8),  # after which nothing is aligned
            "half": torch.randn(COLUMNS, ROWS).to(torch.bfloat16),
            "nothing": torch.empty(0, 3),
        }
        self.paths = [scratch / "model-1.safetensors", scratch / "model-2.safetensors"]
        names = sorted(self.tensors)
        for path, part in zip(self.paths, (names[:5], names[5:]), strict=True):
            save_file({name: self.tensors[name] for name in part}, path)

    def begin(self) -> None:
        """All is well again."""
        self.standin.reset()
        self.devices = StandInDevices(self.standin)
        self.node.touch()
        gds._DEVICE_NODE = str(self.node)
        gds._compared.clear()
        for name in ("fail_read", "refuse_files", "refuse_driver", "spoil", "delay"):
            self.cufile[f"cufile_{name}"](0)
        self.cufile.cufile_supported(1)

    def bytes_read(self) -> int:
        return int(self.cufile.cufile_bytes())

    @contextmanager
    def opened(self, **options: object) -> Iterator[Checkpoint]:
        source = PosixSource()
        settings = load_settings({"transport": "gds", "threads": 3, **options}).settings.loader
        files = open_files(source, SafetensorsFiles(tuple(map(str, self.paths))))
        with Checkpoint(SafetensorsStore(files, source.name, settings, self.devices), PLACE) as checkpoint:
            yield checkpoint

    def read(self, **options: object) -> str:
        """Read all and compare; what the account says."""
        report = LoadReport()
        with self.opened(**options) as checkpoint:
            names = set()
            for name, tensor in checkpoint.tensors(report=report):
                assert torch.equal(tensor, self.tensors[name]), name
                names.add(name)
            assert names == self.tensors.keys()
        return report.line()

    def failure(self, kind: type[Exception] = TransferError, **options: object) -> str:
        """What an attempt to read all says."""
        try:
            self.read(**options)
        except kind as error:
            return str(error)
        raise AssertionError("nothing was wrong")

    def left(self) -> dict[str, int]:
        gc.collect()
        live = _Live()
        self.cufile.cufile_live(ctypes.byref(live))
        return {"handles": live.handles, "registered": live.registered, **self.standin.live()}


def it_is_found_to_be_possible(on: Rehearsal) -> None:
    assert gds.obstacle_to_gds(0) is None


def all_arrives_in_bounded_memory(on: Rehearsal) -> None:
    on.cufile.cufile_delay(2000)
    before = on.bytes_read()
    line = on.read(**SMALL)
    assert "gds" in line, line
    assert on.bytes_read() - before >= sum(tensor.nbytes for tensor in on.tensors.values())
    # Beside the budget, one block may be there that the loop above still holds, or that alone is as large.
    assert on.devices.peak_bytes <= 2 * MIB + 2 * (2 * MIB), on.devices.peak_bytes


class _Busy(StandInDevices):
    """Devices whose memory is still being written to, on its stream, by whoever had it before."""

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        memory = super().empty(nbytes, device)
        if nbytes:
            self._standin.fill(memory, 0x55)
        return memory


def memory_in_use_is_waited_for(on: Rehearsal) -> None:
    on.devices = _Busy(on.standin)
    on.standin.delay(20_000)
    on.read(**SMALL)


def without_that_wait_its_bytes_are_wrong(on: Rehearsal) -> None:
    on.devices = _Busy(on.standin)
    on.devices.synchronize = lambda number: None  # type: ignore[method-assign]
    on.standin.hold_stream(True)
    with on.opened() as checkpoint:
        found = {name: tensor for name, tensor in checkpoint.tensors() if tensor.nbytes > 16 << 10}
    on.standin.hold_stream(False)
    while not on.standin.idle():
        time.sleep(0.001)
    assert any(not torch.equal(tensor, on.tensors[name]) for name, tensor in found.items())


def tensors_that_are_kept_keep_their_memory(on: Rehearsal) -> None:
    with on.opened(**SMALL) as checkpoint:
        kept = dict(checkpoint.tensors())
    gc.collect()
    for name, tensor in kept.items():
        assert torch.equal(tensor, on.tensors[name]), name
        assert not tensor.nbytes or tensor.data_ptr() % 16 == 0


def some_tensors_are_read_alone(on: Rehearsal) -> None:
    wanted = {"bytes", "half", "layers.4.weight"}
    with on.opened() as checkpoint:
        found = {name: tensor.clone() for name, tensor in checkpoint.tensors(wanted)}
    assert found.keys() == wanted
    assert all(torch.equal(tensor, on.tensors[name]) for name, tensor in found.items())


def a_stream_that_is_left_waits_for_reads(on: Rehearsal) -> None:
    on.cufile.cufile_delay(20_000)
    with on.opened(**SMALL) as checkpoint:
        for _ in checkpoint.tensors():
            break


def a_read_that_fails_is_reported(on: Rehearsal) -> None:
    on.read()
    on.cufile.cufile_fail_read(3)
    said = on.failure(**SMALL)
    assert "model-" in said and "GPUDirect Storage could not read" in said and "set transport to auto" in said, said


def wrong_bytes_are_reported_before_any_is_handed_out(on: Rehearsal) -> None:
    on.cufile.cufile_spoil(1)
    said = on.failure()
    assert "GPUDirect Storage got" in said and "bytes wrong" in said, said


def a_file_that_is_refused_is_not_read_in_another_way(on: Rehearsal) -> None:
    before = on.bytes_read()
    on.cufile.cufile_refuse_files(1)
    said = on.failure()
    assert "cuFile refuses this file" in said, said
    assert on.bytes_read() == before


def without_a_driver_it_says_so(on: Rehearsal) -> None:
    on.cufile.cufile_refuse_driver(1)
    said = on.failure(SettingsError)
    assert "transport: gds cannot serve here: cuFile's driver cannot be opened" in said, said


def without_the_kernel_module_it_says_so(on: Rehearsal) -> None:
    on.node.unlink()
    assert "nvidia-fs0 is not there" in on.failure(SettingsError)


def a_device_without_direct_memory_access_is_reported(on: Rehearsal) -> None:
    on.cufile.cufile_supported(0)
    assert "device 0 has no GPUDirect RDMA" in on.failure(SettingsError)


def without_cufile_it_says_so(on: Rehearsal) -> None:
    assert "libcufile.so.0" in on.failure(SettingsError)


SCENARIOS: dict[str, Callable[[Rehearsal], None]] = {
    scenario.__name__: scenario
    for scenario in (
        without_a_driver_it_says_so,  # the first: a driver that was opened stays so
        it_is_found_to_be_possible,
        all_arrives_in_bounded_memory,
        memory_in_use_is_waited_for,
        without_that_wait_its_bytes_are_wrong,
        tensors_that_are_kept_keep_their_memory,
        some_tensors_are_read_alone,
        a_stream_that_is_left_waits_for_reads,
        a_read_that_fails_is_reported,
        wrong_bytes_are_reported_before_any_is_handed_out,
        a_file_that_is_refused_is_not_read_in_another_way,
        without_the_kernel_module_it_says_so,
        a_device_without_direct_memory_access_is_reported,
    )
}


def main() -> None:
    library, scratch, *names = sys.argv[1:]
    rehearsal = Rehearsal(Path(library), Path(scratch))
    for name in names:
        rehearsal.begin()
        try:
            (SCENARIOS.get(name) or without_cufile_it_says_so)(rehearsal)
            left = rehearsal.left()
            assert not any(left.values()), left
            assert rehearsal.standin.violations() == (0, ""), rehearsal.standin.violations()
        except Exception:
            traceback.print_exc()
            print(f"{name}: not so", flush=True)
        else:
            print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main()
