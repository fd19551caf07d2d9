"""The data files of a training checkpoint: opened when they are needed, and read by one set of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch

from ...errors import CheckpointError
from ...formats.dcp_metadata import MAX_METADATA_BYTES, parse_metadata
from ...formats.dcp_parts import METADATA_NAME
from ...report.load_report import LoadReport
from ...sources.source import Source, SourceFile
from ...transfer.constructor import make_readers_for
from ...transfer.device_stream import DeviceStream
from ...transfer.plan import ExtentRow, extent, make_extents
from ...transfer.protocol import ReaderThreads, Transfer, wait_or_cancel
from ..store import complete_report, submit_to
from .boxes import BoxRead, StoredTensor, box_read

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata

    from ...settings import LoaderSettings

COPY_AGAIN = "a file was cut short or belongs to another save: copy the checkpoint again"


class DcpFiles:
    """The data files of a checkpoint, opened when they are needed, and the threads that read them.

    May be used from several threads.

    Args:
        source: where they are.
        directory: the checkpoint's.
        settings: how to read.
    """

    def __init__(self, source: Source, directory: str, settings: LoaderSettings) -> None:
        self.source = source
        self.directory = directory
        self._settings = settings
        self._files: list[SourceFile] = []
        self._numbers: dict[str, int] = {}
        self._readers: ReaderThreads | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._without_data = {self.metadata_path}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def metadata_path(self) -> str:
        """The path of ``.metadata``, for messages."""
        return os.path.join(self.directory, METADATA_NAME)

    def path_of(self, number: int) -> str:
        """The path of a file by its number."""
        return self._files[number].path

    def read_metadata(self, name: str = METADATA_NAME) -> Metadata:
        """Read and check ``.metadata``.

        Raises:
            CheckpointError: it is missing, unreadable or wrong; nothing that it names was run.
        """
        number, file = self._open(name)
        if file.size > MAX_METADATA_BYTES:
            raise CheckpointError(f"the metadata has {file.size} bytes, more than are read", file=file.path)
        return parse_metadata(self.read_bytes(number, 0, file.size), file.path)

    def read_file(self, name: str) -> bytes:
        """All bytes of a small file of the checkpoint's directory.

        Raises:
            CheckpointError: it is missing, cannot be read, or is no small file.
        """
        number, file = self._open(name)
        self._without_data.add(file.path)
        if file.size > MAX_METADATA_BYTES:
            raise CheckpointError(f"the file has {file.size} bytes, more than are read", file=file.path)
        return self.read_bytes(number, 0, file.size)

    def item(self, info: _StorageInfo, name: str) -> tuple[int, SourceFile]:
        """The number and the file of an item, opened, its bounds checked.

        Raises:
            CheckpointError: the file is missing, or the item does not lie within it.
        """
        number, file = self._open(info.relative_path)
        if info.offset + info.length > file.size:
            raise CheckpointError(
                f"{name!r} is {info.length} bytes here, but the file ends after {file.size}",
                file=file.path,
                offset=info.offset,
                hint=COPY_AGAIN,
            )
        return number, file

    def read_item(self, info: _StorageInfo, name: str) -> bytes:
        """All bytes of an item.

        Raises:
            CheckpointError: they cannot be read.
        """
        number, _ = self.item(info, name)
        return self.read_bytes(number, info.offset, info.length)

    def part(
        self, stored: StoredTensor, offsets: Sequence[int], lengths: Sequence[int], target: torch.Tensor
    ) -> BoxRead:
        """The read of a box of a stored tensor into ``target``; see ``box_read``."""
        read = box_read(stored, offsets, lengths, target, self.path_of)
        if stored.pieces is not None:
            read.extents = [part for row in read.extents for part in stored.pieces.extents(row, row[2])]
        return read

    def submit(self, parts: Sequence[BoxRead]) -> Transfer | None:
        """Start reading parts; None where there is nothing to read. Call ``finish`` of each when it is done.

        Raises:
            CheckpointError: an extent reaches beyond its file; other errors come when the transfer is waited for.
        """
        extents = [row for part in parts for row in part.extents]
        if not extents:
            return None
        return self.submit_extents(extents, [part.owner for part in parts])

    def read(self, parts: Sequence[BoxRead]) -> None:
        """Read parts and wait for them.

        Raises:
            CheckpointError: the bytes could not be read; the targets then hold unspecified bytes.
        """
        transfer = self.submit(parts)
        if transfer is not None:
            wait_or_cancel(transfer)
        for part in parts:
            part.finish()

    def verify_unchanged(self) -> None:
        """Raise CheckpointError when a file is shorter than it was."""
        for file in list(self._files):
            file.verify_unchanged()

    def finish(self, report: LoadReport) -> None:
        """Check that no file changed meanwhile, and complete the account.

        Raises:
            CheckpointError: a file is shorter than it was.
        """
        self.verify_unchanged()
        report.count_files(file.path for file in self._files if file.path not in self._without_data)
        complete_report(report, self.source.name, self.running_readers())

    def close(self) -> None:
        """Cancel what is in flight; give back files and threads. Safe to call twice."""
        with self._lock:
            self._closed = True
            readers, self._readers = self._readers, None
            files, self._files = self._files, []
        if readers is not None:
            readers.close()
        for file in files:
            file.close()

    def _open(self, relative_path: str) -> tuple[int, SourceFile]:
        with self._lock:
            if self._closed:
                raise CheckpointError("the checkpoint is closed", file=self.directory)
            number = self._numbers.get(relative_path)
            if number is None:
                self._files.append(self.source.open(os.path.join(self.directory, relative_path)))
                number = self._numbers[relative_path] = len(self._files) - 1
            return number, self._files[number]

    def read_bytes(self, number: int, offset: int, nbytes: int) -> bytes:
        """Bytes of a file by its number, in memory of their own."""
        content = torch.empty(nbytes, dtype=torch.uint8)
        rows = [extent(number, offset, nbytes, content.data_ptr())]
        wait_or_cancel(self.submit_extents(rows, content))
        return content.numpy().tobytes()

    def submit_extents(self, rows: Sequence[ExtentRow], owner: object, stream: DeviceStream | None = None) -> Transfer:
        """Start a plan over the files that are open."""
        return submit_to(stream, self.running_readers(), list(self._files), make_extents(rows), owner)

    def running_readers(self) -> ReaderThreads:
        """The reader threads, which begin with the first read."""
        with self._lock:
            if self._closed:
                raise CheckpointError("the checkpoint is closed", file=self.directory)
            if self._readers is None:
                self._readers = make_readers_for(self._files, self._settings)
            return self._readers
