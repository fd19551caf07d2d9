"""The drop-in for fastsafetensor_3fs_reader, by its name engine_loader.threefs: its names, none of its faults."""

import ctypes
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from engine_loader import CheckpointError, SettingsError, open_checkpoint, threefs
from engine_loader.errors import TransferError
from tests.support.checkpoints import checkpoint, encode, entry
from tests.support.resources import left_open, open_resources
from tests.support.threefs import Emulator
from tests.support.waiting import GENEROUS_S

MIB = 1 << 20


@pytest.fixture
def model(emulator: Emulator) -> Iterator[Path]:
    path = emulator.mount / "model.safetensors"
    path.write_bytes(checkpoint({f"t{n}": entry("I32", (1000 + n, 257), n) for n in range(5)}))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(params=["cpp", "python", "mock"])
def reader(request: pytest.FixtureRequest, emulator: Emulator) -> Iterator[threefs.FileReaderInterface]:
    made = threefs.create_reader(request.param, mount_point=str(emulator.mount))
    yield made
    made.close()


def read_all(reader: threefs.FileReaderInterface, path: Path) -> bytes:
    target = np.zeros(path.stat().st_size, np.uint8)
    assert reader.read_chunked(str(path), target.ctypes.data, 0, len(target)) == len(target)
    return target.tobytes()


def test_the_published_names_and_parameters_are_there() -> None:
    wanted = {
        "read_chunked": ["self", "path", "dev_ptr", "file_offset", "total_length", "chunk_size", "pipelined"],
        "read_headers_batch": ["self", "paths", "num_threads"],
        "close": ["self"],
    }
    for kind in (threefs.FileReaderInterface, threefs.ThreeFSFileReader, threefs.MockFileReader):
        for name, parameters in wanted.items():
            assert list(inspect.signature(getattr(kind, name)).parameters) == parameters
    constructor = inspect.signature(threefs.ThreeFSFileReader).parameters
    defaults = {name: constructor[name].default for name in ("entries", "io_depth", "buffer_size")}
    assert defaults == {"entries": 64, "io_depth": 0, "buffer_size": 64 * MIB}
    for name in ("is_available", "get_backend", "create_reader", "get_hf3fs_lib_path", "extract_mount_point"):
        assert name in threefs.__all__


def test_the_short_name_and_the_long_one_mean_the_same() -> None:
    from engine_loader.compat import fastsafetensor_3fs_reader

    assert threefs.__all__ == fastsafetensor_3fs_reader.__all__
    for name in threefs.__all__:
        assert getattr(threefs, name) is getattr(fastsafetensor_3fs_reader, name)


def test_headers_and_bytes(reader: threefs.FileReaderInterface, model: Path) -> None:
    content = model.read_bytes()
    (header, length, size) = reader.read_headers_batch([str(model)])[str(model)]
    assert (8 + len(header), size) == (length, len(content))
    assert list(json.loads(header)) == [f"t{n}" for n in range(5)]
    assert read_all(reader, model) == content
    target = np.zeros(1000, np.uint8)
    assert reader.read_chunked(str(model), target.ctypes.data, length, 1000, 0, pipelined=True) == 1000
    assert target.tobytes() == content[length : length + 1000]
    assert reader.read_headers_batch([]) == {}


def test_bytes_beyond_the_end_are_not_counted(reader: threefs.FileReaderInterface, model: Path) -> None:
    size = model.stat().st_size
    target = np.full(1000, 0xAA, np.uint8)
    assert reader.read_chunked(str(model), target.ctypes.data, size - 10, 1000) == 10
    assert (target[10:] == 0xAA).all()
    assert reader.read_chunked(str(model), target.ctypes.data, size + 5, 10) == 0


def test_an_address_of_zero_reads_and_throws_away(reader: threefs.FileReaderInterface, model: Path) -> None:
    assert reader.read_chunked(str(model), 0, 0, 1 << 40) == model.stat().st_size


# --- The published faults, one test each ---------------------------------------------------------------------------


def test_many_reads_are_in_flight_for_one_call(emulator: Emulator) -> None:
    path = emulator.mount / "big"
    path.write_bytes(bytes(64 * MIB))
    emulator.set("latency_us=300000")  # none ends before they are all begun
    with threefs.ThreeFSFileReader(str(emulator.mount)) as reader:
        reader.read_chunked(str(path), 0, 0, 64 * MIB)
    assert emulator.count("max_in_flight") >= 16
    path.unlink()


def test_a_missing_file_is_an_exception(reader: threefs.FileReaderInterface, emulator: Emulator) -> None:
    missing = str(emulator.mount / "missing")
    with pytest.raises(CheckpointError, match=r"missing: could not open the file: No such file"):
        reader.read_headers_batch([missing])
    with pytest.raises(CheckpointError, match="missing"):
        reader.read_chunked(missing, 0, 0, 10)


@pytest.mark.parametrize("content", [b"", b"short", encode("{not json}"), encode({}, length=1 << 60)])
def test_a_corrupt_header_is_an_exception(
    reader: threefs.FileReaderInterface, emulator: Emulator, content: bytes
) -> None:
    path = emulator.mount / "corrupt.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"corrupt\.safetensors"):
        reader.read_headers_batch([str(path)])
    path.unlink()


def test_several_threads_on_one_reader_get_their_own_bytes(
    reader: threefs.FileReaderInterface, emulator: Emulator
) -> None:
    paths = []
    for number in range(4):
        paths.append(emulator.mount / f"part{number}")
        paths[-1].write_bytes(np.random.default_rng(number).bytes(3 * MIB + number))
    with ThreadPoolExecutor(4) as threads:
        for path, got in zip(paths * 5, threads.map(lambda path: read_all(reader, path), paths * 5), strict=True):
            assert got == path.read_bytes()
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("backend", ["cpp", "python", "mock"])
def test_reading_headers_again_leaks_no_descriptor(
    backend: str, model: Path, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One ring, and it is made by the first read that is not small: later ones must add nothing.
    monkeypatch.setenv("ENGINE_LOADER_LOADER__USRBIO_RINGS", "1")
    with threefs.create_reader(backend, mount_point=str(emulator.mount)) as reader:
        assert read_all(reader, model) == model.read_bytes()
        before, registered = open_resources(), emulator.count("registrations")
        for _ in range(20):
            reader.read_headers_batch([str(model)] * 3, num_threads=3)
            assert read_all(reader, model) == model.read_bytes()
        assert left_open(before) == []
        assert emulator.count("registrations") == registered <= 1


@pytest.mark.parametrize("backend", ["cpp", "python"])
def test_a_short_read_is_resumed(emulator: Emulator, model: Path, backend: str) -> None:
    emulator.set("short_every=2")
    with threefs.ThreeFSFileReader(str(emulator.mount), backend=backend) as reader:
        assert read_all(reader, model) == model.read_bytes()


def test_a_file_that_became_shorter_is_an_exception(emulator: Emulator, model: Path) -> None:
    with threefs.ThreeFSFileReader(str(emulator.mount)) as reader:
        size = model.stat().st_size
        reader.read_headers_batch([str(model)])
        os.truncate(model, size // 2)
        target = np.zeros(size, np.uint8)
        with pytest.raises(TransferError, match="the file ended here"):
            reader.read_chunked(str(model), target.ctypes.data, 0, size)


_INTERRUPTED = """
import sys
import numpy as np
from engine_loader import threefs
reader = threefs.create_reader("cpp", mount_point=sys.argv[1])
target = np.zeros(1 << 20, np.uint8)
try:
    print("reading", flush=True)
    reader.read_chunked(sys.argv[2], target.ctypes.data, 0, len(target))
except KeyboardInterrupt:
    reader.close()
    sys.exit(77)
"""


def test_a_wait_can_be_interrupted(emulator: Emulator, model: Path) -> None:
    import signal

    environment = {**os.environ, **emulator.environment("hang_every=1")}
    command = [sys.executable, "-c", _INTERRUPTED, str(emulator.mount), str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.wait(GENEROUS_S) == 77


_FORKED = """
import os, sys
import numpy as np
from engine_loader import threefs
def read():
    target = np.zeros(os.path.getsize(sys.argv[2]), np.uint8)
    reader.read_chunked(sys.argv[2], target.ctypes.data, 0, len(target))
    return target.tobytes() == open(sys.argv[2], "rb").read()
reader = threefs.create_reader(sys.argv[3], mount_point=sys.argv[1])
assert read()
child = os.fork()
if child == 0:
    ok = False
    try:
        ok = read()
        reader.close()
    finally:
        os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert read()
reader.close()
"""


@pytest.mark.parametrize("backend", ["cpp", "python"])
def test_a_reader_works_on_in_parent_and_child(emulator: Emulator, model: Path, backend: str) -> None:
    environment = {**os.environ, **emulator.environment()}
    command = [sys.executable, "-c", _FORKED, str(emulator.mount), str(model), backend]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "emulator:" not in done.stderr


@pytest.mark.parametrize(("entries", "buffer_size"), [(3, 1_000_003), (64, 64 * MIB), (7, 5 * MIB), (2, 4096)])
@pytest.mark.parametrize("backend", ["cpp", "python"])
def test_all_bytes_come_whatever_the_buffer(
    emulator: Emulator, model: Path, backend: str, entries: int, buffer_size: int
) -> None:
    with threefs.ThreeFSFileReader(str(emulator.mount), entries, 0, buffer_size, backend=backend) as reader:
        assert read_all(reader, model) == model.read_bytes()


@pytest.mark.slow
def test_more_than_two_gib_come_in_one_call(emulator: Emulator) -> None:
    size = (2 << 30) + 4096
    path = emulator.mount / "large"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size - 5)
        file.write(b"hello")
    target = np.zeros(size, np.uint8)
    with threefs.MockFileReader(mount_point="", buffer_size=1) as reader:
        assert reader.read_chunked(str(path), target.ctypes.data, 0, size, pipelined=True) == size
    assert target[-5:].tobytes() == b"hello"
    path.unlink()


def test_available_only_when_a_read_would_work(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threefs.is_available()
    assert threefs.get_backend() == "cpp"
    assert threefs.get_hf3fs_lib_path() == str(emulator.library)
    monkeypatch.setenv("FASTSAFETENSORS_BACKEND", "mock")
    assert not threefs.is_available()
    monkeypatch.delenv("FASTSAFETENSORS_BACKEND")
    monkeypatch.delenv("HF3FS_LIB_DIR")
    assert not threefs.is_available()
    assert (threefs.get_backend(), threefs.get_hf3fs_lib_path()) == ("mock", None)


# --- Choosing ------------------------------------------------------------------------------------------------------


def test_backends_are_chosen_as_before(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    for forced in ("cpp", "python", "mock"):
        monkeypatch.setenv("FASTSAFETENSORS_BACKEND", forced)
        assert threefs.get_backend() == forced
    monkeypatch.setenv("FASTSAFETENSORS_BACKEND", "rust")
    with pytest.raises(SettingsError, match="cpp, python, mock, auto"):
        threefs.get_backend()
    with pytest.raises(ValueError, match="rust"):
        threefs.create_reader("rust")


def test_what_is_asked_for_and_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    with pytest.raises(CheckpointError, match="there is no such directory"):
        threefs.ThreeFSFileReader("/no/such/mount")
    monkeypatch.delenv("HF3FS_LIB_DIR")
    with pytest.raises(CheckpointError, match="HF3FS_LIB_DIR is not set"):
        threefs.create_reader("cpp", mount_point=str(emulator.mount))
    with pytest.raises(ValueError, match="entries"):
        threefs.ThreeFSFileReader(str(emulator.mount), entries=4, io_depth=8)


def test_auto_falls_back_to_the_mock_and_says_so(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HF3FS_LIB_DIR")
    assert isinstance(threefs.create_reader(mount_point=str(emulator.mount)), threefs.MockFileReader)
    assert "ordinary reads stand in for it" in caplog.text


def test_without_3fs_the_reader_reads_ordinary_files_and_says_so(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HF3FS_LIB_DIR")
    with threefs.ThreeFSFileReader("/no/such/mount") as reader:
        assert reader.mount_point == "/no/such/mount"
        assert read_all(reader, model) == model.read_bytes()
    assert "ordinary reads stand in for it" in caplog.text
    caplog.clear()
    monkeypatch.setenv("FASTSAFETENSORS_BACKEND", "mock")
    with threefs.ThreeFSFileReader(str(model.parent), 64, 4, 1 << 20, mount_name="name", token="secret") as reader:
        assert read_all(reader, model) == model.read_bytes()
    assert caplog.text == "", "the variable says so already"


@pytest.mark.parametrize("backend", ["cpp", "python"])
def test_files_outside_the_mount_are_read_through_the_kernel(
    emulator: Emulator, model: Path, tmp_path: Path, backend: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(model.read_bytes())
    with threefs.ThreeFSFileReader(str(emulator.mount), backend=backend, token="passed over") as reader:
        assert read_all(reader, elsewhere) == model.read_bytes()
        by_usrbio = emulator.count("bytes")
        assert read_all(reader, model) == model.read_bytes()
        assert emulator.count("bytes") - by_usrbio > model.stat().st_size * 0.9
        assert emulator.count("bytes") > by_usrbio


def test_a_reader_has_a_buffer_to_read_into(emulator: Emulator, model: Path) -> None:
    with threefs.ThreeFSFileReader(str(emulator.mount), buffer_size=8 * MIB) as reader:
        assert reader.iov_length == 8 * MIB
        assert reader.read_chunked(str(model), reader.iov_base, 0, 100_000) == 100_000
        assert ctypes.string_at(reader.iov_base, 100_000) == model.read_bytes()[:100_000]


def test_it_says_which_files_are_open(reader: threefs.FileReaderInterface, model: Path) -> None:
    assert isinstance(reader, threefs.ThreeFSFileReader | threefs.MockFileReader)
    assert not reader.has_fd(str(model))
    reader.read_headers_batch([str(model)])
    assert reader.has_fd(str(model))
    reader.close()
    assert not reader.has_fd(str(model))


def test_the_package_s_public_modules_are_found(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    names = ["", ".interface", ".mock", ".reader_cpp", ".reader_py"]
    for name in names:
        monkeypatch.setitem(sys.modules, f"fastsafetensor_3fs_reader{name}", None)
    threefs.install()
    modules = [importlib.import_module(f"fastsafetensor_3fs_reader{name}") for name in names]
    assert modules[0].ThreeFSFileReader is threefs.ThreeFSFileReader
    assert modules[1].FileReaderInterface is threefs.FileReaderInterface
    assert modules[2].MockFileReader is threefs.MockFileReader
    for module, kind in ((modules[3], "ThreeFSFileReaderCpp"), (modules[4], "ThreeFSFileReaderPy")):
        assert module.check_library()
        with getattr(module, kind)(str(emulator.mount)) as reader:
            assert isinstance(reader, threefs.ThreeFSFileReader)
    monkeypatch.delenv("HF3FS_LIB_DIR")
    assert not modules[3].check_library()


def empty_stand_in() -> types.ModuleType:
    return types.ModuleType("hf3fs_py_usrbio")  # find_spec raises ValueError for it


@pytest.mark.parametrize("stand_in", [empty_stand_in, mock.MagicMock])
def test_a_stand_in_for_the_binding_does_no_harm(
    stand_in: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, emulator: Emulator, model: Path
) -> None:
    monkeypatch.setitem(sys.modules, "hf3fs_py_usrbio", stand_in())
    monkeypatch.delenv("HF3FS_LIB_DIR")
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.get_tensor("t1").shape == (1001, 257)
    with threefs.create_reader(mount_point=str(emulator.mount)) as reader:
        assert read_all(reader, model) == model.read_bytes()
    if stand_in is empty_stand_in:
        assert threefs.get_backend() == "mock"


def test_mount_points(emulator: Emulator, model: Path, tmp_path: Path) -> None:
    assert threefs.extract_mount_point(str(model)) == str(emulator.mount)
    assert threefs.extract_mount_point(str(tmp_path)) == ""
    assert threefs.extract_mount_point(str(tmp_path / "missing")) == ""


# --- fastsafetensors -----------------------------------------------------------------------------------------------


@pytest.fixture
def fastsafetensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("fastsafetensors")
    monkeypatch.delitem(sys.modules, "fastsafetensor_3fs_reader", raising=False)
    yield
    sys.modules.pop("fastsafetensor_3fs_reader", None)


def check_loader(loader: object, model: Path) -> None:
    """Load ``model`` by a loader of fastsafetensors, and compare with safetensors."""
    import torch
    from safetensors import safe_open

    loader.add_filenames({0: [str(model)]})  # type: ignore[attr-defined]
    buffer = loader.copy_files_to_device()  # type: ignore[attr-defined]
    with safe_open(str(model), "pt") as expected:
        for name in expected.keys():  # noqa: SIM118 - it is no dictionary
            assert torch.equal(buffer.get_tensor(name), expected.get_tensor(name))
    buffer.close()
    loader.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("fastsafetensors")
def test_fastsafetensors_own_3fs_loader_runs_on_it(emulator: Emulator, model: Path) -> None:
    from fastsafetensors.threefs_loader import ThreeFSLoader

    threefs.install()
    bytes_before = emulator.count("bytes")
    loader = ThreeFSLoader(None, device="cpu", mount_point=str(emulator.mount), set_numa=False)
    reader = loader.copier_constructor.reader
    check_loader(loader, model)
    assert emulator.count("bytes") - bytes_before > model.stat().st_size * 0.9, "the bytes came by USRBIO"
    reader.close()


@pytest.mark.usefixtures("fastsafetensors")
def test_it_is_a_copier_of_fastsafetensors(emulator: Emulator, model: Path) -> None:
    from fastsafetensors import cpp
    from fastsafetensors.common import resolve_runtime_lib_name
    from fastsafetensors.copier.registry import create_copier_constructor, get_copier_class
    from fastsafetensors.frameworks import get_framework_op
    from fastsafetensors.loader import BaseSafeTensorsFileLoader

    threefs.register_copier("engine-loader")
    assert get_copier_class("engine-loader").__name__ == "ThreeFSFileCopier"
    constructor = create_copier_constructor("engine-loader", None, mount_point=str(emulator.mount))
    assert isinstance(constructor.reader, threefs.ThreeFSFileReader)
    constructor.reader.close()
    cpp.load_library_functions(resolve_runtime_lib_name())
    framework = get_framework_op("pytorch")
    loader = BaseSafeTensorsFileLoader(
        None,
        framework.get_device("cpu", framework.get_process_group(None)),
        copier_type="engine-loader",
        set_numa=False,
        disable_cache=True,
        framework="pytorch",
        mount_point=str(emulator.mount),
    )
    check_loader(loader, model)
