"""Memory stays where it is for as long as a read can write to it, whatever ends the wait for the read."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_loader.compat.address_reader import AddressReader
from engine_loader.errors import TransferError
from engine_loader.settings import LoaderSettings
from engine_loader.sources.posix import PosixSource
from engine_loader.transfer import device_copy
from engine_loader.transfer.device_copy import DeviceWriter
from engine_loader.transfer.protocol import Transfer


class Interrupted:
    """A transfer whose wait ends with Ctrl-C."""

    nbytes = 0
    bytes_done = 0

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.cancelled = False

    def wait(self, extent: int | None = None, timeout_s: float | None = None) -> bool:
        raise KeyboardInterrupt

    def cancel(self) -> None:
        self.cancelled = True


class Threads:
    """Reader threads that never get to a read."""

    name, threads = "python", 1

    def __init__(self) -> None:
        self.transfers: list[Interrupted] = []

    def submit(self, files: Any, extents: Any, *, ordered: bool = True, owner: object = None) -> Transfer:
        self.transfers.append(Interrupted(owner))
        return self.transfers[-1]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("what", ["address", "discard", "header"])
def test_ctrl_c_cancels_the_read_and_its_memory_is_held(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))
    path = str(tmp_path / "file")
    threads = Threads()
    target = np.zeros(5000, np.uint8)
    with AddressReader(PosixSource(), LoaderSettings()) as reader:
        reader._readers = threads  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            if what == "header":
                reader.read_headers_batch([path])
            else:
                reader.read_chunked(path, target.ctypes.data if what == "address" else 0, 0, 5000)
    (transfer,) = threads.transfers
    assert transfer.cancelled
    assert (transfer.owner is None) == (what == "address"), "memory of the caller is the caller's to keep"


class Driver:
    """A CUDA driver whose copies fail."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 700 if name == "cuMemcpyHtoD_v2" else 0


class Reading:
    """A transfer that has come, or is on the way until it is cancelled."""

    nbytes = 0
    bytes_done = 0

    def __init__(self) -> None:
        self.cancelled = False

    def wait(self, extent: int | None = None, timeout_s: float | None = None) -> bool:
        return True

    def cancel(self) -> None:
        self.cancelled = True


def test_a_copy_to_the_device_that_fails_cancels_the_read_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copy, "_driver", Driver)
    writer = DeviceWriter(4096, 4096)
    started: list[tuple[int, int, Reading]] = []
    held: list[object] = []

    def read(offset: int, length: int, address: int, owner: object) -> Transfer:
        assert ctypes.addressof(ctypes.c_char.from_buffer(owner)) == address  # type: ignore[arg-type]
        held.append(owner)
        started.append((offset, length, Reading()))
        return started[-1][2]

    with pytest.raises(TransferError, match="error 700"):
        writer.write(10_000, read)
    assert [(offset, length) for offset, length, _ in started] == [(0, 4096), (4096, 4096)]
    assert [transfer.cancelled for *_, transfer in started] == [False, True]
    writer.close()
    (ctypes.c_char * 4096).from_buffer(held[1])[0] = b"x"  # type: ignore[arg-type]  # still mapped
