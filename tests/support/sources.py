"""Sources that count what is read of them, and that fail on command."""

import posixpath
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from engine_loader.errors import CheckpointError
from engine_loader.settings import load_settings
from engine_loader.sources.source import UsrbioAccess

if TYPE_CHECKING:
    from engine_loader.loading.checkpoint import Checkpoint

Behaviour = Callable[[int, int], int]
"""(offset, bytes wanted) -> bytes given; it may raise OSError, or take its time."""


class FakeFile:
    """Content in memory, and the reads that were made of it.

    Attributes:
        reads: (offset, bytes given) of every read.
        behave: what a read does; by default it gives what is wanted.
        closed: how often it was closed.
    """

    source = "fake"
    remote = False
    mappable = False
    native_access: UsrbioAccess | None = None

    def __init__(self, content: bytes, path: str = "/fake.safetensors", *, size: int | None = None) -> None:
        self.path = path
        self.size = len(content) if size is None else size
        self.reads: list[tuple[int, int]] = []
        self.behave: Behaviour = lambda offset, wanted: wanted
        self.closed = 0
        self._content = content
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        return sum(nbytes for _, nbytes in self.reads)

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        given = min(self.behave(offset, sum(map(len, buffers))), max(0, len(self._content) - offset))
        with self._lock:
            self.reads.append((offset, given))
        done = 0
        for buffer in buffers:
            piece = self._content[offset + done : offset + min(given, done + len(buffer))]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def fileno(self) -> int | None:
        return None

    def identity(self) -> str | None:
        return None

    def verify_unchanged(self) -> None:
        return

    def close(self) -> None:
        self.closed += 1


class Stuck:
    """Behaviour of a read that hangs until it is released.

    Attributes:
        reads: how many hang just now.
    """

    def __init__(self) -> None:
        self.reads = 0
        self._lock = threading.Lock()
        self._released = threading.Event()

    def __call__(self, offset: int, wanted: int) -> int:
        with self._lock:
            self.reads += 1
        self._released.wait()
        with self._lock:
            self.reads -= 1
        return wanted

    def release(self) -> None:
        self._released.set()


class FakeSource:
    """Opens FakeFiles."""

    name = "fake"

    def __init__(self, files: Mapping[str, FakeFile]) -> None:
        self.files = files

    def open(self, path: str) -> FakeFile:
        if path not in self.files:
            raise CheckpointError("there is no such file", file=path)
        return self.files[path]

    def is_dir(self, path: str) -> bool:
        return any(posixpath.dirname(name) == path for name in self.files)

    def list(self, path: str) -> list[str]:
        return sorted(posixpath.basename(name) for name in self.files if posixpath.dirname(name) == path)

    def folders(self, path: str) -> Sequence[str]:
        below = [name.removeprefix(f"{path}/") for name in self.files if name.startswith(f"{path}/")]
        return sorted({name.partition("/")[0] for name in below if "/" in name})


def open_fake(*files: FakeFile, **options: object) -> "Checkpoint":
    """A checkpoint of these files."""
    import torch

    from engine_loader.loading.checkpoint import Checkpoint
    from engine_loader.loading.find import SafetensorsFiles
    from engine_loader.loading.safetensors_store import SafetensorsStore
    from engine_loader.loading.shards import open_files

    source = FakeSource({file.path: file for file in files})
    settings = load_settings(options).settings.loader
    opened = open_files(source, SafetensorsFiles(tuple(file.path for file in files)))
    return Checkpoint(SafetensorsStore(opened, source.name, settings), torch.device("cpu"))
