"""Reads and writes DCP checkpoints in S3: the reader and the writer of directories, on objects."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.planner import WriteItem

from ..sources.object_store.object_source import ObjectStoreSource
from .broken_saves import DATA_FILE
from .file_layout import is_tensor, tensor_nbytes
from .prefixes import DefaultPrefixStrategy, S3PrefixStrategyBase
from .reader import FileSystemReader
from .s3_config import AnyClientConfig
from .s3_file_system import S3FileSystem
from .writer import FileSystemWriter

# torch.save adds about so many bytes to a tensor.
_ITEM_BYTES = 4 << 10
_DELETES_AT_ONCE = 16


@dataclass
class StorageMetadata:
    """The storage data that the coordinator adds to each rank's plan.

    Attributes:
        prefix: of the names of the rank's objects.
    """

    prefix: str


class _ObjectStorage:
    """What the reader and the writer share."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True if this is a URL of an object store."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)


class S3StorageReader(_ObjectStorage, FileSystemReader):
    """Loads a checkpoint from S3 in ``dcp.load``. See FileSystemReader for what it reads and how.

    Only the bytes that the plan needs are requested, in ranges of up to ``part_size``, several at once.

    Args:
        region: of the bucket; "": the region of the environment.
        path: URL of the checkpoint: ``s3://bucket/prefix``, also ``gs://`` and ``az://``.
        s3client_config: options of the client, this package's or s3torchconnector's; None: the loader's settings.
        reader_constructor: s3torchconnector's way of reading; passed over, since the plan says what is read.
        _extension_registry: has the transforms with which the items were written.
        trust_pickles: also unpickle items that ``weights_only`` refuses: the author of the checkpoint can then run code
            here.
        options: settings of the loader by name, e.g. ``object_store_requests=32``; they override ``s3client_config``.

    Raises:
        CheckpointError: obstore is not installed, or ``path`` is no such URL; (when it loads) an object is missing,
            cut short or damaged, was replaced while it was read, or is not available.
    """

    def __init__(
        self,
        region: str,
        path: str | os.PathLike[str],
        s3client_config: AnyClientConfig | None = None,
        reader_constructor: Any | None = None,
        *,
        _extension_registry: ExtensionRegistry | None = None,
        trust_pickles: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(path, _extension_registry, trust_pickles=trust_pickles, **options)
        fs = S3FileSystem(region, s3client_config=s3client_config, reader_constructor=reader_constructor, **options)
        self.fs: S3FileSystem = fs  # type: ignore[assignment]  # torch's is its local file system
        self.path = fs.init_path(path)
        self.sync_files = False
        self._settings = fs.setup.settings

    def _source(self) -> ObjectStoreSource:
        return self.fs.source()


class S3StorageWriter(_ObjectStorage, FileSystemWriter):
    """Saves a checkpoint to S3 in ``dcp.save`` and ``dcp.async_save``. See FileSystemWriter for the rest.

    Objects are uploaded in parts while they are written. If there is a checkpoint at ``path``, the new objects get
    other names, ``.metadata`` is replaced when all of them are complete, and the old objects are deleted last: a crash
    leaves the old checkpoint or the new one. Objects of interrupted saves are deleted then as well: right below the
    prefixes that this checkpoint's objects or those of the replaced one have, and below those that ``prefix_strategy``
    gives to ranks of a larger world.

    Args:
        region: of the bucket; "": the region of the environment.
        path: URL of the checkpoint: ``s3://bucket/prefix``, also ``gs://`` and ``az://``.
        s3client_config: options of the client, this package's or s3torchconnector's; None: the loader's settings.
        prefix_strategy: chooses the names of each rank's objects; None: DefaultPrefixStrategy.
        thread_count: how many threads write.
        kwargs: of FileSystemWriter, without ``sync_files``: an object that was uploaded is on permanent storage.

    Raises:
        CheckpointError: obstore is not installed, or ``path`` is no such URL; (when it saves) there is a checkpoint
            already and ``overwrite=False``, or the server refuses or fails.
    """

    def __init__(
        self,
        region: str,
        path: str | os.PathLike[str],
        s3client_config: AnyClientConfig | None = None,
        prefix_strategy: S3PrefixStrategyBase | None = None,
        thread_count: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, sync_files=False, thread_count=thread_count, **kwargs)
        fs = S3FileSystem(region, s3client_config=s3client_config)
        fs.parts_at_once = max(1, fs.parts_at_once // self.thread_count)
        self.fs: S3FileSystem = fs  # type: ignore[assignment]  # torch's is its local file system
        self.path = fs.init_path(path)
        self.prefix_strategy = prefix_strategy or DefaultPrefixStrategy()

    def _storage_data(self, rank: int) -> StorageMetadata:
        return StorageMetadata(self.prefix_strategy(rank))

    def _create(self, name: str, items: Sequence[WriteItem]) -> AbstractContextManager[io.IOBase]:
        expected = sum(map(tensor_nbytes, filter(is_tensor, items))) + _ITEM_BYTES * len(items)
        return self.fs.create_stream(self.fs.concat_path(self.path, name), "wb", expected_bytes=expected)

    def _names_in(self, directory: str) -> Sequence[str]:
        prefix = self.fs.concat_path(self.path, directory) if directory else os.fspath(self.path)
        return [os.path.basename(url) for url in self.fs.ls(prefix)]

    def _times_of(self, directories: Collection[str]) -> dict[str, float]:
        if not any(directories):
            return dict(self.fs.times(self.path))
        # A world of more ranks than this one had prefixes of its own.
        return {
            name: changed
            for name, changed in self.fs.times_below(self.path).items()
            if name.rpartition("/")[0] in directories or self._may_be_of_a_rank(name)
        }

    def _may_be_of_a_rank(self, name: str) -> bool:
        match = DATA_FILE.match(name.rpartition("/")[2])
        return match is not None and self.prefix_strategy.is_of(int(match[1]), name[: name.rindex("_") + 1])

    def _publish(self, metadata: bytes, path: str | os.PathLike[str]) -> None:
        # An upload replaces an object atomically: no temporary name is needed.
        with self.fs.create_stream(path, "wb") as stream:
            stream.write(metadata)

    def _delete(self, names: Collection[str]) -> None:
        if names:
            with ThreadPoolExecutor(min(_DELETES_AT_ONCE, len(names))) as threads:
                list(threads.map(self._delete_file, names))
