"""Storages for torch.distributed.checkpoint (DCP), with the interfaces of torch's and s3torchconnector's classes.

The S3 classes need the extra ``s3``; without it, their constructors raise CheckpointError.
"""

from __future__ import annotations

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase, SerializationFormat

from .huggingface.hf_reader import HuggingFaceStorageReader
from .huggingface.hf_writer import HuggingFaceStorageWriter
from .huggingface.quantised_reader import QuantizedHuggingFaceStorageReader
from .prefixes import (
    BinaryPrefixStrategy,
    DefaultPrefixStrategy,
    HexPrefixStrategy,
    NumericPrefixStrategy,
    RoundRobinPrefixStrategy,
    S3PrefixStrategyBase,
)
from .reader import FileSystemReader
from .s3_config import S3ClientConfig
from .s3_file_system import S3FileSystem
from .s3_storage import S3StorageReader, S3StorageWriter
from .writer import FileSystemWriter

__all__ = [
    "BinaryPrefixStrategy",
    "DefaultPrefixStrategy",
    "FileSystem",
    "FileSystemBase",
    "FileSystemReader",
    "FileSystemWriter",
    "HexPrefixStrategy",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "NumericPrefixStrategy",
    "QuantizedHuggingFaceStorageReader",
    "RoundRobinPrefixStrategy",
    "S3ClientConfig",
    "S3FileSystem",
    "S3PrefixStrategyBase",
    "S3StorageReader",
    "S3StorageWriter",
    "SerializationFormat",
]
