"""Writes DCP checkpoints: the old checkpoint or the new one is there at any moment, and complete."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import pickle
import queue
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..errors import CheckpointError
from ..formats.dcp_metadata import parse_metadata
from ..machine import sync_directory
from .safetensors_items import tensor_bytes, write_header

logger = logging.getLogger(__name__)

_DATA_FILE = re.compile(r"__(\d+)_(\d+)\.distcp\Z")
_VERSION = "1.0.0"


class FileSystemWriter(torch_filesystem.FileSystemWriter):
    """Takes the place of ``torch.distributed.checkpoint.FileSystemWriter`` in ``dcp.save`` and ``dcp.async_save``.

    What it writes, torch's reader reads, and the other way round (of safetensors items: see below). Where there is a
    checkpoint already, the new one's files get names of their own, ``.metadata`` is replaced at once when all of them
    are complete, and the old files are deleted last: a crash leaves the old checkpoint or the new one.

    Args:
        path: the checkpoint's directory; it is made.
        single_file_per_rank: ``thread_count`` files per rank, not one per tensor.
        sync_files: force every file, and the directory, to permanent storage before it counts as written.
        thread_count: how many threads write.
        per_thread_copy_ahead: bytes to copy from the GPU ahead of writing, where one thread writes.
        cache_staged_state_dict: keep the CPU copy of ``async_save`` for the next one.
        overwrite: replace a checkpoint that is there; False: that is an error.
        _extensions: transforms of the items; not with safetensors.
        serialization_format: ``TORCH_SAVE``, or ``SAFETENSORS``: each file is a valid safetensors file with the
            offsets of its chunks in ``__metadata__``; items that are not tensors are in files of their own. Such a
            checkpoint is read by this package's reader (and by torch's HuggingFaceStorageReader, where files are named
            for it).

    Raises:
        ValueError: ``_extensions`` with safetensors, or ``thread_count`` is less than one.
        CheckpointError: (when it saves) there is a checkpoint already, or a tensor cannot be stored as safetensors.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[StreamTransformExtension] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
    ) -> None:
        if thread_count < 1:
            raise ValueError(f"thread_count is {thread_count}; it takes at least one thread to write")
        if _extensions and serialization_format == SerializationFormat.SAFETENSORS:
            raise ValueError("a safetensors file holds tensors as they are: transforms go with TORCH_SAVE only")
        super().__init__(
            path,
            single_file_per_rank=single_file_per_rank,
            sync_files=sync_files,
            thread_count=thread_count,
            per_thread_copy_ahead=per_thread_copy_ahead,
            cache_staged_state_dict=cache_staged_state_dict,
            overwrite=overwrite,
            _extensions=_extensions,
            serialization_format=serialization_format,
        )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the directory, and refuse to write over a checkpoint with ``overwrite=False``.

        Raises:
            CheckpointError: there is one already.
        """
        self.fs.mkdir(self.path)
        if not self.overwrite and self._metadata_exists():
            raise CheckpointError(
                "there is a checkpoint already", file=os.fspath(self.path), hint="write elsewhere, or overwrite=True"
            )
        if self.rank is not None and self._writes_alone():
            plan = dataclasses.replace(plan, storage_data=self._storage_data(self.rank))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank what the names of its files begin with."""
        return [
            dataclasses.replace(plan, storage_data=self._storage_data(rank)) if plan.storage_data is None else plan
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of the plan.

        Raises:
            CheckpointError: a tensor cannot be stored as asked.
            OSError: a file cannot be written.
        """
        prefix: str = plan.storage_data.prefix
        number = self._first_free_number(prefix)
        jobs: queue.SimpleQueue[tuple[str, list[WriteItem]]] = queue.SimpleQueue()
        for bucket in self._buckets(plan.items):
            jobs.put((f"{prefix}{number}{torch_filesystem.DEFAULT_SUFFIX}", bucket))
            number += 1
        results: list[WriteResult] = []
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=self._work, args=(jobs, planner, results, failures), daemon=True)
            for _ in range(1, self.thread_count)
        ]
        for thread in threads:
            thread.start()
        self._work(jobs, planner, results, failures)
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the checkpoint the one that is there: write its metadata, then delete the files of the one before.

        Raises:
            OSError: the metadata cannot be written.
        """
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        metadata.storage_meta = self.storage_meta()
        metadata.version = _VERSION
        path = self._get_metadata_path(self.rank if self._writes_alone() else None)
        before = self._files_of(path)
        self._publish(pickle.dumps(metadata), path)
        used = {info.relative_path for info in metadata.storage_data.values()}
        self._delete(before - used)

    def _publish(self, metadata: bytes, path: str | os.PathLike[str]) -> None:
        """Put the metadata into its place at once."""
        draft = self.fs.concat_path(self.path, os.path.basename(os.fspath(path)) + ".tmp")
        with self.fs.create_stream(draft, "wb") as stream:
            cast(io.BufferedIOBase, stream).write(metadata)
            self._sync(stream)
        self.fs.rename(draft, path)
        self._sync_directory()

    def _delete(self, names: Collection[str]) -> None:
        """Delete files of the checkpoint that was replaced. The new one is complete without it."""
        for name in names:
            self._delete_file(name)

    def _delete_file(self, name: str) -> None:
        try:
            self.fs.rm_file(self.fs.concat_path(self.path, name))
        except FileNotFoundError:
            return
        except (OSError, CheckpointError) as error:
            logger.warning("a file of the checkpoint that was replaced is left over: %s", error)

    def _storage_data(self, rank: int) -> Any:
        """What a rank's plan is told: its ``prefix`` is that of the names of its files."""
        return torch_filesystem._StoragePrefix(f"__{rank}_")

    def _create(self, name: str, items: Sequence[WriteItem]) -> AbstractContextManager[io.IOBase]:
        """Open a data file for writing."""
        return self.fs.create_stream(self.fs.concat_path(self.path, name), "wb")

    def _names_in(self, directory: str) -> Sequence[str]:
        """The names of the files right in a directory of the checkpoint; none where there is no such directory."""
        try:
            return os.listdir(os.path.join(self.path, directory))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _writes_alone(self) -> bool:
        """Whether each rank writes a checkpoint of its own."""
        return self.rank is not None and not self.use_collectives

    def _first_free_number(self, prefix: str) -> int:
        """What is there keeps its files until the new metadata is, and a crashed save may have left some."""
        directory, _, begin = prefix.rpartition("/")
        names = [name for name in self._names_in(directory) if name.startswith(begin)]
        return max((int(match[2]) for match in map(_DATA_FILE.match, names) if match), default=-1) + 1

    def _files_of(self, metadata_path: str | os.PathLike[str]) -> set[str]:
        """The data files that belong to the checkpoint that is being replaced."""
        try:
            with self.fs.create_stream(metadata_path, "rb") as stream:
                content = cast(io.BufferedIOBase, stream).read()
            old = parse_metadata(content, os.fspath(metadata_path))
        except (OSError, CheckpointError):
            return set()  # then nothing of it is deleted
        names = {info.relative_path for info in (old.storage_data or {}).values()}
        return {name for name in names if _DATA_FILE.match(name.rpartition("/")[2])}

    def _buckets(self, items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
        """The items of each file; no file is without any, for no metadata would tell of it."""
        safetensors = self.serialization_format == SerializationFormat.SAFETENSORS
        buckets = _by_size(self.thread_count, items) if self.single_file_per_rank else [[item] for item in items]
        for bucket in filter(None, buckets):
            yield from _apart(bucket) if safetensors else [bucket]

    def _work(
        self,
        jobs: queue.SimpleQueue[tuple[str, list[WriteItem]]],
        planner: SavePlanner,
        results: list[WriteResult],
        failures: list[BaseException],
    ) -> None:
        try:
            while not failures:
                name, items = jobs.get_nowait()
                results += self._write_file(name, items, planner)
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
        others = [item for item in items if item.type == WriteItemType.BYTE_IO]
        safetensors = self.serialization_format == SerializationFormat.SAFETENSORS and not others
        with self._create(name, items) as opened:
            stream = cast(io.BufferedIOBase, opened)
            results = [self._write_bytes(name, stream, item, planner) for item in others]
            if safetensors:
                results += self._write_safetensors(name, stream, tensors, planner)
            else:
                for item, tensor in self._on_cpu(tensors, planner):
                    results.append(self._write_item(name, stream, item, partial(torch.save, tensor)))
            self._sync(opened)
        return results

    def _write_bytes(self, name: str, stream: io.BufferedIOBase, item: WriteItem, planner: SavePlanner) -> WriteResult:
        data = planner.resolve_data(item)
        assert isinstance(data, io.BytesIO)
        return self._write_item(name, stream, item, lambda to: to.write(data.getbuffer()))

    def _write_item(
        self, name: str, stream: io.BufferedIOBase, item: WriteItem, write: Callable[[Any], object]
    ) -> WriteResult:
        """Write an item through the transforms."""
        begin = stream.tell()
        to, descriptors = self.transforms.transform_save_stream(item, cast(io.IOBase, stream))
        write(to)
        to.close()
        return _result(item, name, begin, stream.tell() - begin, list(descriptors) or None)

    def _write_safetensors(
        self, name: str, stream: io.BufferedIOBase, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        """The header first, so that one tensor at a time is in memory."""
        results: list[WriteResult] = []
        places = write_header(stream, items)
        for item, tensor in self._on_cpu([item for item, _, _ in places], planner):
            _, offset, nbytes = places[len(results)]
            data = item.tensor_data
            assert data is not None
            if tensor.dtype != data.properties.dtype or tensor.shape != data.chunk.sizes:
                raise CheckpointError(
                    f"{item.index.fqn!r} was planned as {data.properties.dtype} {list(data.chunk.sizes)} "
                    f"and came as {tensor.dtype} {list(tensor.shape)}"
                )
            stream.write(tensor_bytes(tensor))
            results.append(_result(item, name, offset, nbytes, None))
        return results

    def _on_cpu(self, items: Sequence[WriteItem], planner: SavePlanner) -> Iterator[tuple[WriteItem, torch.Tensor]]:
        """(item, tensor in CPU memory that holds nothing else) in the order of the items."""
        loader: torch_filesystem._TensorLoader
        if self.thread_count == 1 and torch.cuda.is_available() and self.per_thread_copy_ahead > 0:
            loader = torch_filesystem._OverlappingCpuLoader(
                planner.resolve_data, inflight_threshhold=self.per_thread_copy_ahead
            )
        else:
            loader = torch_filesystem._SerialCpuLoader(planner.resolve_data)
        for number, item in enumerate(items):
            loader.add(number, item)  # it sorts by this number
        loader.start_loading()
        for tensor, loaded in loader.values():
            yield cast(WriteItem, loaded), tensor

    def _sync(self, stream: Any) -> None:
        stream.flush()
        if self.sync_files:
            try:
                descriptor = stream.fileno()
            except (AttributeError, io.UnsupportedOperation):
                return
            os.fsync(descriptor)

    def _sync_directory(self) -> None:
        if self.sync_files:
            sync_directory(self.path)


def _result(item: WriteItem, name: str, offset: int, length: int, descriptors: list[str] | None) -> WriteResult:
    place = _StorageInfo(name, offset, length, transform_descriptors=descriptors)
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=place)


def _by_size(count: int, items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Items that are not tensors in turn; tensors, largest first, each to where the least is."""
    if count == 1:
        return [list(items)]
    buckets: list[list[WriteItem]] = [[] for _ in range(count)]
    others = [item for item in items if item.type == WriteItemType.BYTE_IO]
    for number, item in enumerate(others):
        buckets[number % count].append(item)
    sizes = [0] * count
    tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
    for item in sorted(tensors, key=nbytes_of, reverse=True):
        least = sizes.index(min(sizes))
        buckets[least].append(item)
        sizes[least] += nbytes_of(item)
    return buckets


def _apart(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    """What can be in one safetensors file: tensors only, each name once."""
    others = [item for item in items if item.type == WriteItemType.BYTE_IO]
    if others:
        yield others
    times: defaultdict[str, int] = defaultdict(int)
    files: defaultdict[int, list[WriteItem]] = defaultdict(list)
    for item in items:
        if item.type != WriteItemType.BYTE_IO:
            files[times[item.index.fqn]].append(item)
            times[item.index.fqn] += 1
    yield from files.values()


def nbytes_of(item: WriteItem) -> int:
    """The size of what is written of a tensor: its chunk."""
    data = item.tensor_data
    assert data is not None
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize
