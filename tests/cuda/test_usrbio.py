"""From 3FS to a device: the rings' buffers are the page-locked slots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_loader.errors import TransferError
from engine_loader.sources.threefs.threefs_source import ThreeFsOptions, ThreeFsSource
from engine_loader.transfer.device_stream import DeviceStream
from engine_loader.transfer.native.native_readers import NativeReaders
from engine_loader.transfer.plan import make_extents
from tests.support.threefs import machine_with_3fs

from .standin_devices import StandIn, StandInDevices

KIB, MIB = 1 << 10, 1 << 20
OPTIONS = ThreeFsOptions(rings=2, depth=6, io_bytes=256 * KIB, deadline_s=20.0)
CONTENT = np.random.default_rng(7).bytes(5 * MIB + 12345)


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with machine_with_3fs(monkeypatch) as running:
        path = running.mount / "model.bin"
        path.write_bytes(CONTENT)
        yield path
        path.unlink(missing_ok=True)


@pytest.fixture
def readers(standin: StandIn) -> Iterator[NativeReaders]:
    readers = NativeReaders(2, block_bytes=256 * KIB, pinned_bytes=MIB, device_runtime=str(standin.path))
    yield readers
    readers.close()


def place(readers: NativeReaders, path: Path, memory: torch.Tensor, rows: list[tuple[int, ...]]) -> None:
    """Carry out a plan whose addresses count from the start of ``memory``."""
    file = ThreeFsSource(OPTIONS).open(str(path))
    plan = make_extents(rows)
    plan["address"] += np.uint64(memory.data_ptr())
    transfer = readers.submit_to_device([file], plan, DeviceStream(0), owner=memory)
    try:
        transfer.wait()
    finally:
        transfer.cancel()
        file.close()


def test_a_file_arrives_again_and_again(path: Path, standin: StandIn, readers: NativeReaders) -> None:
    standin.delay(1500)
    devices = StandInDevices(standin)
    for _ in range(3):
        memory = devices.empty(len(CONTENT), torch.device("cpu"))
        standin.fill(memory, 0)
        place(readers, path, memory, [(0, 1, 0, len(CONTENT), 0, 0, 0)])
        assert memory.numpy().tobytes() == CONTENT
    counters = readers.counters()
    assert counters["usrbio_bytes"] == counters["device_bytes"] == 3 * len(CONTENT) == readers.statistics().bytes_read


def test_no_page_locked_slots_are_made_for_what_rings_bring(
    path: Path, standin: StandIn, readers: NativeReaders, tmp_path: Path
) -> None:
    from engine_loader.sources.posix import PosixSource

    memory = StandInDevices(standin).empty(len(CONTENT), torch.device("cpu"))
    place(readers, path, memory, [(0, 1, 0, len(CONTENT), 0, 0, 0)])
    rings = standin.live()["pinned"]
    assert rings <= 2, "the rings' own buffers"
    (tmp_path / "other").write_bytes(CONTENT)
    plan = make_extents([(0, 1, 0, len(CONTENT), 0, memory.data_ptr(), 0)])
    other = PosixSource().open(str(tmp_path / "other"))
    readers.submit_to_device([other], plan, DeviceStream(0), owner=memory).wait()
    other.close()
    assert standin.live()["pinned"] == rings + 1
    assert memory.numpy().tobytes() == CONTENT


def test_rows_arrive(path: Path, standin: StandIn, readers: NativeReaders) -> None:
    standin.delay(500)
    memory = StandInDevices(standin).tensor(300, 1024, dtype=torch.uint8)
    standin.fill(memory, 0)
    place(readers, path, memory, [(0, 300, 11, 1000, 10_000, 0, 1024)])
    for number in range(300):
        start = 11 + number * 10_000
        assert memory[number, :1000].numpy().tobytes() == CONTENT[start : start + 1000]
    assert not memory[:, 1000:].any(), "bytes between rows are not ours to write"


def test_a_copy_that_fails_is_reported(path: Path, standin: StandIn, readers: NativeReaders) -> None:
    standin.delay(500)
    memory = StandInDevices(standin).empty(len(CONTENT), torch.device("cpu"))
    standin.fail_copy(5)
    with pytest.raises(TransferError, match="illegal memory access") as failure:
        place(readers, path, memory, [(0, 1, 0, len(CONTENT), 0, 0, 0)])
    assert failure.value.file == str(path)


def test_a_cancel_waits_for_copies(path: Path, standin: StandIn, readers: NativeReaders) -> None:
    standin.delay(5000)
    memory = StandInDevices(standin).empty(len(CONTENT), torch.device("cpu"))
    file = ThreeFsSource(OPTIONS).open(str(path))
    plan = make_extents([(0, 1, 0, len(CONTENT), 0, memory.data_ptr(), 0)])
    transfer = readers.submit_to_device([file], plan, DeviceStream(0), owner=memory)
    while standin.in_flight() < 2:
        transfer.wait(timeout_s=0.001)
    transfer.cancel()
    assert standin.in_flight() == 0
    file.close()
