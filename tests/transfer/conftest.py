"""The transfer engines, each of which passes the same tests."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from engine_loader.errors import TransferError
from engine_loader.sources.posix import PosixFile, PosixSource
from engine_loader.sources.source import SourceFile
from engine_loader.transfer.native.engine import NativeEngine, load_library
from engine_loader.transfer.plan import ExtentRow, Extents, extent, make_extents
from engine_loader.transfer.protocol import Transfer, TransferEngine
from engine_loader.transfer.python.engine import PythonEngine

MakeEngine = Callable[..., TransferEngine]

GUARD = 0xEE
"""What destinations hold before, and beside what is read into them."""


class Destination:
    """Memory to read into."""

    def __init__(self, nbytes: int) -> None:
        self.memory = np.full(nbytes, GUARD, np.uint8)
        self.address = self.memory.ctypes.data

    def __bytes__(self) -> bytes:
        return self.memory.tobytes()


def read(
    engine: TransferEngine, files: Sequence[SourceFile], rows: Sequence[ExtentRow], nbytes: int, **options: bool
) -> bytes:
    """Carry out a plan whose addresses count from the start of ``nbytes`` of new memory; what is there in the end."""
    target = Destination(nbytes)
    transfer = start(engine, files, rows, target, **options)
    assert transfer.wait()
    assert transfer.bytes_done == transfer.nbytes
    return bytes(target)


def start(
    engine: TransferEngine,
    files: Sequence[SourceFile],
    rows: Sequence[ExtentRow] | Extents,
    target: Destination,
    **options: bool,
) -> Transfer:
    """Submit a plan whose addresses count from the start of ``target``."""
    plan = rows.copy() if isinstance(rows, np.ndarray) else make_extents(rows)
    plan["address"] += np.uint64(target.address)
    return engine.submit(files, plan, owner=target.memory, **options)


def endless(nbytes: int) -> Extents:
    """A plan that takes a minute: the first ``nbytes`` of a file, again and again to one place."""
    return np.repeat(make_extents([extent(0, 0, nbytes, 0)]), (1 << 38) // nbytes)


def _python(**options: object) -> TransferEngine:
    return PythonEngine(**options)  # type: ignore[arg-type]


def _buffered(**options: object) -> TransferEngine:
    return NativeEngine(**options, read_mode="buffered")  # type: ignore[arg-type]


def _direct(**options: object) -> TransferEngine:
    return NativeEngine(**options, read_mode="direct")  # type: ignore[arg-type]


ENGINES = {"python": _python, "native": _buffered, "native-direct": _direct}


@pytest.fixture
def python_engine() -> Iterator[MakeEngine]:
    """Makes Python engines, and closes them after the test: for sources that have no descriptor."""
    yield from _making(_python)


@pytest.fixture(params=list(ENGINES))
def make_engine(request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    """Makes engines of one kind, and closes them after the test."""
    if request.param != "python":
        try:
            load_library()
        except TransferError as error:
            pytest.skip(f"no native engine: {error}")
    yield from _making(ENGINES[request.param])


def _making(kind: MakeEngine) -> Iterator[MakeEngine]:
    made: list[TransferEngine] = []

    def make(threads: int = 2, **options: object) -> TransferEngine:
        made.append(kind(threads=threads, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling and closing wait for a read for as long as it takes.

    Else a machine that stalls for half a second makes a read look stuck, which is then given up and left to itself.
    """
    for name in ("native.engine.CANCEL_GRACE_S", "native.transfer.CANCEL_GRACE_S", "python.engine._CANCEL_GRACE_S"):
        monkeypatch.setattr(f"engine_loader.transfer.{name}", 600.0)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[bytes], PosixFile]]:
    """Writes a file and opens it."""
    files: list[PosixFile] = []

    def write_and_open(content: bytes) -> PosixFile:
        path = tmp_path / f"file-{len(files)}"
        path.write_bytes(content)
        files.append(PosixSource().open(str(path)))
        return files[-1]

    yield write_and_open
    for file in files:
        file.close()
