"""The right bytes, whatever the plan, and by however many threads, readers and processes."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine_loader import open_checkpoint
from engine_loader.errors import TransferError
from engine_loader.sources.threefs.threefs_source import ThreeFsOptions
from engine_loader.transfer.plan import make_extents
from tests.support.checkpoints import checkpoint, entry
from tests.support.threefs import Emulator

from .conftest import KIB, MIB, SMALL, MakeReader


def test_a_whole_file_arrives(make_reader: MakeReader, path: Path, content: bytes) -> None:
    reader = make_reader()
    assert reader.read(path) == [content]
    statistics = reader.readers.statistics()
    assert statistics.modes == {"usrbio": len(content)}
    assert statistics.bytes_read == len(content)


def test_pieces_anywhere_arrive(make_reader: MakeReader, path: Path, content: bytes) -> None:
    rng = random.Random(3)
    pieces = [(0, 1), (len(content) - 1, 1), (4095, 2), (512 * KIB - 7, 14), (17, 0)]
    for _ in range(200):
        offset = rng.randrange(len(content))
        pieces.append((offset, rng.randrange(1, min(len(content) - offset, 1 << rng.randrange(1, 20)) + 1)))
    assert make_reader().read(path, pieces) == [content[at : at + length] for at, length in pieces]


@pytest.mark.parametrize(
    ("rows", "row_bytes", "stride"), [(100, 1000, 50_000), (3000, 16, 1024), (3, 600_000, 1_500_000)]
)
def test_rows_arrive(
    make_reader: MakeReader, path: Path, content: bytes, rows: int, row_bytes: int, stride: int
) -> None:
    reader = make_reader()
    file = reader.open(path)
    target = np.zeros((rows, row_bytes + 3), np.uint8)
    plan = make_extents([(0, rows, 11, row_bytes, stride, target.ctypes.data, row_bytes + 3)])
    reader.readers.submit([file], plan, owner=target).wait()
    file.close()
    for number in range(rows):
        start = 11 + number * stride
        assert target[number, :row_bytes].tobytes() == content[start : start + row_bytes]
    assert not target[:, row_bytes:].any(), "bytes between rows are not ours to write"


def test_an_empty_file_is_read(make_reader: MakeReader, emulator: Emulator) -> None:
    (emulator.mount / "empty").touch()
    assert make_reader().read(emulator.mount / "empty") == [b""]


def test_at_least_16_reads_are_in_flight_on_each_ring(native_reader: MakeReader, emulator: Emulator) -> None:
    big = emulator.mount / "big"
    big.write_bytes(bytes(64 * MIB))
    emulator.set("latency_us=100000")
    native_reader(ThreeFsOptions(rings=1, depth=16, io_bytes=1 * MIB)).read(big)
    assert emulator.count("max_in_flight") >= 16
    big.unlink()


def test_files_of_two_sizes_of_io_share_an_readers(native_reader: MakeReader, path: Path, content: bytes) -> None:
    one = native_reader(SMALL)
    other = native_reader(ThreeFsOptions(rings=1, depth=3, io_bytes=128 * KIB))
    files = [one.open(path), other.open(path)]
    places = [np.zeros(len(content), np.uint8) for _ in files]
    plan = make_extents([(number, 1, 0, len(content), 0, place.ctypes.data, 0) for number, place in enumerate(places)])
    one.readers.submit(files, plan, owner=places).wait()
    for file, place in zip(files, places, strict=True):
        file.close()
        assert place.tobytes() == content


def test_files_on_3fs_and_others_in_one_plan(
    native_reader: MakeReader, path: Path, content: bytes, tmp_path: Path
) -> None:
    from engine_loader.sources.posix import PosixSource

    (tmp_path / "other").write_bytes(content[::-1])
    reader = native_reader()
    files = [reader.open(path), PosixSource().open(str(tmp_path / "other"))]
    places = [np.zeros(len(content), np.uint8) for _ in files]
    plan = make_extents([(number, 1, 0, len(content), 0, place.ctypes.data, 0) for number, place in enumerate(places)])
    reader.readers.submit(files, plan, owner=places).wait()
    for file in files:
        file.close()
    assert [place.tobytes() for place in places] == [content, content[::-1]]
    assert reader.readers.statistics().modes == {"usrbio": len(content), "buffered": len(content)}


def test_two_threads_on_one_reader(make_reader: MakeReader, path: Path, content: bytes) -> None:
    reader = make_reader()
    with ThreadPoolExecutor(2) as threads:
        for got in threads.map(lambda _: reader.read(path), range(20)):
            assert got == [content]


def test_ten_readers_in_one_process(make_reader: MakeReader, path: Path, content: bytes) -> None:
    readers = [make_reader(ThreeFsOptions(rings=1, depth=4, io_bytes=256 * KIB)) for _ in range(10)]
    with ThreadPoolExecutor(10) as threads:
        assert all(threads.map(lambda reader: reader.read(path) == [content], readers))


_CHILD = """
import sys, zlib
from engine_loader.sources.threefs.threefs_source import ThreeFsOptions
from tests.sources.threefs.conftest import Reader, ThreeFsSource, NativeReaders
from pathlib import Path
reader = Reader(ThreeFsSource(ThreeFsOptions(rings=1, depth=4, io_bytes=1 << 18)), NativeReaders(2))
for _ in range(5):
    (got,) = reader.read(Path(sys.argv[1]))
    print(zlib.crc32(got))
reader.readers.close()
"""


def test_two_processes(emulator: Emulator, path: Path, content: bytes) -> None:
    import zlib

    environment = {**os.environ, **emulator.environment("jitter_us=500")}
    children = [
        subprocess.Popen([sys.executable, "-c", _CHILD, str(path)], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    for child in children:
        out, _ = child.communicate(timeout=240)
        assert out.split() == [str(zlib.crc32(content))] * 5
        assert child.returncode == 0


_FORK = """
import os, sys
from pathlib import Path
from engine_loader import open_checkpoint, TransferError
from tests.sources.threefs.conftest import Reader, ThreeFsSource, ThreeFsOptions, NativeReaders, PythonReaders
path = Path(sys.argv[1])
content = path.read_bytes()
options = ThreeFsOptions(rings=2, depth=4, io_bytes=1 << 18)
kind = {"native": NativeReaders, "python": PythonReaders}[sys.argv[2]]
reader = Reader(ThreeFsSource(options), kind(2))
assert reader.read(path) == [content]
held = reader.open(path)
child = os.fork()
if child == 0:
    try:
        try:
            reader.read(path)
        except TransferError as error:
            assert "reader threads do not survive a fork" in str(error), error
        else:
            os._exit(3)
        held.close()
        mine = Reader(ThreeFsSource(options), kind(2))
        ok = mine.read(path) == [content]
        mine.readers.close()
        os._exit(0 if ok else 4)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(5)
_, status = os.waitpid(child, 0)
assert reader.read(path) == [content], "the parent reads on"
held.close()
reader.readers.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("kind", ["native", "python"])
def test_a_fork_in_between(emulator: Emulator, path: Path, kind: str) -> None:
    environment = {**os.environ, **emulator.environment()}
    command = [sys.executable, "-c", _FORK, str(path), kind]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "emulator:" not in done.stderr, "no rule of the library was broken"


def test_closing_a_file_twice_or_from_two_threads_is_well(make_reader: MakeReader, path: Path) -> None:
    file = make_reader().open(path)
    threads = [threading.Thread(target=file.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def model(emulator: Emulator) -> Iterator[Path]:
    path = emulator.mount / "model.safetensors"
    path.write_bytes(checkpoint({f"t{n}": entry("I32", (100 + n, 257), n) for n in range(20)}))
    yield path
    path.unlink()


@pytest.mark.parametrize("engine", ["cpp", "python"])
@pytest.mark.parametrize("backend", ["usrbio", "auto"])
def test_a_checkpoint_on_3fs_is_read_by_usrbio(model: Path, engine: str, backend: str, tmp_path: Path) -> None:
    import torch

    from engine_loader.report.load_report import LoadReport

    copy = tmp_path / model.name
    copy.write_bytes(model.read_bytes())
    report = LoadReport()
    with open_checkpoint(model, backend=backend, engine=engine) as on_3fs, open_checkpoint(copy) as elsewhere:
        got = {name: tensor.clone() for name, tensor in on_3fs.tensors(report=report)}
        for name, tensor in elsewhere.tensors():
            assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8))
        assert torch.equal(on_3fs.get_tensor("t3"), elsewhere.get_tensor("t3"))
        assert torch.equal(on_3fs.get_slice("t4")[5:50, 3], elsewhere.get_slice("t4")[5:50, 3])
    assert "from usrbio" in report.line()


def test_a_reader_closed_by_another_thread_ends_the_wait(
    native_reader: MakeReader, path: Path, emulator: Emulator
) -> None:
    emulator.set("latency_us=300000")
    reader = native_reader()
    threading.Timer(0.1, reader.readers.close).start()
    with pytest.raises(TransferError):
        reader.read(path)
