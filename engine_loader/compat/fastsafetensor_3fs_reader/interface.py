"""What a reader of the package fastsafetensor_3fs_reader does."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["FileReaderInterface"]


class FileReaderInterface(ABC):
    """What a reader does. Files are opened when they are first asked for, and stay open until ``close``."""

    @abstractmethod
    def read_chunked(
        self,
        path: str,
        dev_ptr: int,
        file_offset: int,
        total_length: int,
        chunk_size: int = 0,
        pipelined: bool = False,
    ) -> int:
        """Read bytes of a file into memory; returns how many there were, fewer only at the end of the file.

        Args:
            path: the file.
            dev_ptr: address of host or CUDA memory; 0 reads and throws away.
            file_offset: in bytes.
            total_length: in bytes.
            chunk_size: a hint that is not needed: reads are cut to suit the storage.
            pipelined: accepted; reads are always pipelined.

        Raises:
            CheckpointError: the file cannot be opened, or not all of these bytes could be read.
        """

    @abstractmethod
    def read_headers_batch(self, paths: list[str], num_threads: int = 8) -> dict[str, tuple[str, int, int]]:
        """Read safetensors headers, ``num_threads`` at a time.

        Returns:
            path -> (header as JSON text, 8 + length of the header in bytes, size of the file in bytes).

        Raises:
            CheckpointError: a file cannot be opened, or its header is wrong.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back files, rings and threads. Safe to call twice."""
