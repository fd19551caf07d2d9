"""The kinds of reader threads, each of which passes the same tests."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from engine_loader.errors import TransferError
from engine_loader.sources.posix import PosixFile, PosixSource
from engine_loader.sources.source import SourceFile
from engine_loader.transfer.native.native_readers import NativeReaders, load_library
from engine_loader.transfer.plan import ExtentRow, Extents, extent, make_extents
from engine_loader.transfer.protocol import ReaderThreads, Transfer
from engine_loader.transfer.python.python_readers import PythonReaders

MakeReaders = Callable[..., ReaderThreads]

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
    readers: ReaderThreads, files: Sequence[SourceFile], rows: Sequence[ExtentRow], nbytes: int, **options: bool
) -> bytes:
    """Carry out a plan whose addresses count from the start of ``nbytes`` of new memory; what is there in the end."""
    target = Destination(nbytes)
    transfer = start(readers, files, rows, target, **options)
    assert transfer.wait()
    assert transfer.bytes_done == transfer.nbytes
    return bytes(target)


def start(
    readers: ReaderThreads,
    files: Sequence[SourceFile],
    rows: Sequence[ExtentRow] | Extents,
    target: Destination,
    **options: bool,
) -> Transfer:
    """Submit a plan whose addresses count from the start of ``target``."""
    plan = rows.copy() if isinstance(rows, np.ndarray) else make_extents(rows)
    plan["address"] += np.uint64(target.address)
    return readers.submit(files, plan, owner=target.memory, **options)


def endless(nbytes: int) -> Extents:
    """A plan that takes a minute: the first ``nbytes`` of a file, again and again to one place."""
    return np.repeat(make_extents([extent(0, 0, nbytes, 0)]), (1 << 38) // nbytes)


def _python(**options: object) -> ReaderThreads:
    return PythonReaders(**options)  # type: ignore[arg-type]


def _buffered(**options: object) -> ReaderThreads:
    return NativeReaders(**options, read_mode="buffered")  # type: ignore[arg-type]


def _direct(**options: object) -> ReaderThreads:
    return NativeReaders(**options, read_mode="direct")  # type: ignore[arg-type]


READERS = {"python": _python, "native": _buffered, "native-direct": _direct}


@pytest.fixture
def python_readers() -> Iterator[MakeReaders]:
    """Makes PythonReaders, and closes them after the test: for sources that have no descriptor."""
    yield from _making(_python)


@pytest.fixture(params=list(READERS))
def make_readers(request: pytest.FixtureRequest) -> Iterator[MakeReaders]:
    """Makes reader threads of one kind, and closes them after the test."""
    if request.param != "python":
        try:
            load_library()
        except TransferError as error:
            pytest.skip(f"no native readers: {error}")
    yield from _making(READERS[request.param])


def _making(kind: MakeReaders) -> Iterator[MakeReaders]:
    made: list[ReaderThreads] = []

    def make(threads: int = 2, **options: object) -> ReaderThreads:
        made.append(kind(threads=threads, **options))
        return made[-1]

    yield make
    for readers in made:
        readers.close()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling and closing wait for a read for as long as it takes.

    Else a machine that stalls for half a second makes a read look stuck, which is then given up and left to itself.
    """
    for name in (
        "native.native_readers.CANCEL_GRACE_S",
        "native.transfer.CANCEL_GRACE_S",
        "python.python_readers.CANCEL_GRACE_S",
        "python.python_transfer.CANCEL_GRACE_S",
    ):
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
