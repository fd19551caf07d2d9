"""Readers over the emulator: native reader threads, Python ones by ctypes, Python ones by the binding."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from engine_loader.sources.threefs.threefs_source import ThreeFsFile, ThreeFsOptions, ThreeFsSource
from engine_loader.transfer.native.native_readers import NativeReaders
from engine_loader.transfer.plan import make_extents
from engine_loader.transfer.protocol import ReaderThreads
from engine_loader.transfer.python.python_readers import PythonReaders
from tests.support.threefs import Emulator, machine_with_3fs

KIB, MIB = 1 << 10, 1 << 20
BINDING = Path(__file__).parent / "binding"
SMALL = ThreeFsOptions(rings=2, depth=16, io_bytes=512 * KIB, deadline_s=20.0)


class Reader:
    """A source and reader threads over the emulator."""

    def __init__(self, source: ThreeFsSource, readers: ReaderThreads) -> None:
        self.source = source
        self.readers = readers

    def open(self, path: Path) -> ThreeFsFile:
        file = self.source.open(str(path))
        assert isinstance(file, ThreeFsFile)
        return file

    def read(self, path: Path, pieces: list[tuple[int, int]] | None = None) -> list[bytes]:
        """The (offset, length) pieces of a file, in one plan; all of it by default."""
        file = self.open(path)
        try:
            places = [np.zeros(length, np.uint8) for _, length in pieces or [(0, file.size)]]
            rows = [
                (0, 1, offset, length, 0, place.ctypes.data, 0)
                for (offset, length), place in zip(pieces or [(0, file.size)], places, strict=True)
            ]
            transfer = self.readers.submit([file], make_extents(rows), owner=places)
            try:
                transfer.wait()
            except BaseException:
                transfer.cancel()
                raise
            return [place.tobytes() for place in places]
        finally:
            file.close()


MakeReader = Callable[..., Reader]


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    with machine_with_3fs(monkeypatch) as running:
        yield running


@pytest.fixture
def only_binding(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library to be found, but a binding to be imported."""
    monkeypatch.delenv("HF3FS_LIB_DIR")
    monkeypatch.setenv("TEST_EMULATOR", str(emulator.library))
    monkeypatch.syspath_prepend(str(BINDING))
    yield
    sys.modules.pop("hf3fs_py_usrbio", None)


@pytest.fixture(params=["native", "python", "binding"])
def make_reader(request: pytest.FixtureRequest, emulator: Emulator) -> Iterator[MakeReader]:
    """Makes readers of each kind; closes them at the end."""
    if request.param == "binding":
        request.getfixturevalue("only_binding")
    with ExitStack() as stack:

        def make(options: ThreeFsOptions = SMALL, **reader_options: object) -> Reader:
            kind = NativeReaders if request.param == "native" else PythonReaders
            settings = {"retry_delay_s": 0.001, "block_bytes": 1 * MIB, **reader_options}
            readers = kind(2, **settings)
            stack.callback(readers.close)
            return Reader(ThreeFsSource(options), readers)

        yield make


@pytest.fixture
def native_reader(emulator: Emulator) -> Iterator[MakeReader]:
    """Makes readers with native reader threads only."""
    with ExitStack() as stack:

        def make(options: ThreeFsOptions = SMALL, **reader_options: object) -> Reader:
            readers = NativeReaders(2, **{"retry_delay_s": 0.001, **reader_options})
            stack.callback(readers.close)
            return Reader(ThreeFsSource(options), readers)

        yield make


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(7).bytes(5 * MIB + 12345)


@pytest.fixture
def path(emulator: Emulator, content: bytes) -> Iterator[Path]:
    path = emulator.mount / "model.bin"
    path.write_bytes(content)
    yield path
    path.unlink(missing_ok=True)
