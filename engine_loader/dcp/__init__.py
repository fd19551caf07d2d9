"""torch.distributed.checkpoint (DCP) storages: the classes of torch under their names, faster and safer."""

from __future__ import annotations

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase, SerializationFormat

from .reader import FileSystemReader
from .writer import FileSystemWriter

__all__ = ["FileSystem", "FileSystemBase", "FileSystemReader", "FileSystemWriter", "SerializationFormat"]
