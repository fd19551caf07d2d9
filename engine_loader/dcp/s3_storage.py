"""DCP checkpoints in S3: the reader and the writer of directories, over objects."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from ..sources.object_store.object_source import ObjectStoreSource
from .prefixes import DefaultPrefixStrategy, S3PrefixStrategyBase
from .reader import FileSystemReader
from .s3_config import S3ClientConfig
from .s3_file_system import S3FileSystem
from .writer import FileSystemWriter, nbytes_of

# torch.save puts about so much around a tensor.
_ITEM_BYTES = 4 << 10
_DELETES_AT_ONCE = 16


@dataclass
class StorageMetadata:
    """What each rank is told by the coordinator.

    Attributes:
        prefix: what the names of its objects begin with.
    """

    prefix: str


class S3StorageReader(FileSystemReader):
    """Loads a checkpoint from S3 in ``dcp.load``; everything else is as with FileSystemReader.

    Only the bytes that the plan wants are asked for, in ranges of up to ``part_size``, several at once.

    Args:
        region: the bucket's; "" takes the environment's.
        path: URL of the checkpoint: ``s3://bucket/prefix``, also ``gs://`` and ``az://``.
        s3client_config: how the store is reached; None: by the loader's settings.
        _extension_registry: of the transforms that items were written with.
        trust_pickles: also hand over items that ``weights_only`` refuses; whoever wrote them can then run code here.
        options: settings of the loader by name, e.g. ``object_store_requests=32``; they go before the config.

    Raises:
        CheckpointError: obstore is not installed, or ``path`` is no such URL; (when it loads) an object is missing,
            cut short or damaged, was replaced while it was read, or cannot be had.
    """

    def __init__(
        self,
        region: str,
        path: str | os.PathLike[str],
        s3client_config: S3ClientConfig | None = None,
        _extension_registry: ExtensionRegistry | None = None,
        *,
        trust_pickles: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(path, _extension_registry, trust_pickles=trust_pickles, **options)
        fs = S3FileSystem(region, s3client_config=s3client_config, **options)
        self.fs: S3FileSystem = fs  # type: ignore[assignment]  # torch's is its local file system
        self.path = fs.init_path(path)
        self._settings = fs.setup.settings

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a URL of an object store."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)

    def _source(self) -> ObjectStoreSource:
        return self.fs.source()


class S3StorageWriter(FileSystemWriter):
    """Saves a checkpoint to S3 in ``dcp.save`` and ``dcp.async_save``; otherwise as FileSystemWriter.

    Objects are uploaded in parts while they are written. Over a checkpoint that is there, new objects get names of
    their own, ``.metadata`` is replaced when all of them are complete, and the old ones are deleted last: a crash
    leaves the old checkpoint or the new one.

    Args:
        region: the bucket's; "" takes the environment's.
        path: URL of the checkpoint: ``s3://bucket/prefix``, also ``gs://`` and ``az://``.
        s3client_config: how the store is reached; None: by the loader's settings.
        prefix_strategy: names each rank's objects; None: as in a directory.
        kwargs: those of FileSystemWriter, but for ``sync_files``: an object that is there is stored.

    Raises:
        CheckpointError: obstore is not installed, or ``path`` is no such URL; (when it saves) there is a checkpoint
            already and ``overwrite=False``, or the server refuses or fails.
    """

    def __init__(
        self,
        region: str,
        path: str | os.PathLike[str],
        s3client_config: S3ClientConfig | None = None,
        prefix_strategy: S3PrefixStrategyBase | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, sync_files=False, **kwargs)
        fs = S3FileSystem(region, s3client_config=s3client_config)
        fs.parts_at_once = max(1, fs.parts_at_once // self.thread_count)
        self.fs: S3FileSystem = fs  # type: ignore[assignment]  # torch's is its local file system
        self.path = fs.init_path(path)
        self.prefix_strategy = prefix_strategy or DefaultPrefixStrategy()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a URL of an object store."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)

    def _storage_data(self, rank: int) -> StorageMetadata:
        return StorageMetadata(self.prefix_strategy(rank))

    def _create(self, name: str, items: Sequence[WriteItem]) -> AbstractContextManager[io.IOBase]:
        tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
        expected = sum(map(nbytes_of, tensors)) + _ITEM_BYTES * len(items)
        return self.fs.create_stream(self.fs.concat_path(self.path, name), "wb", expected_bytes=expected)

    def _names_in(self, directory: str) -> Sequence[str]:
        place = self.fs.concat_path(self.path, directory) if directory else os.fspath(self.path)
        return [os.path.basename(url) for url in self.fs.ls(place)]

    def _publish(self, metadata: bytes, path: str | os.PathLike[str]) -> None:
        # An object is replaced at once; a draft would only have to be copied.
        with self.fs.create_stream(path, "wb") as stream:
            stream.write(metadata)

    def _delete(self, names: Collection[str]) -> None:
        if names:
            with ThreadPoolExecutor(min(_DELETES_AT_ONCE, len(names))) as threads:
                list(threads.map(self._delete_file, names))
