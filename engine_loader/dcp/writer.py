"""Writes DCP checkpoints. At any moment, the directory holds a complete checkpoint: the old one or the new one."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import pickle
import queue
import threading
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, cast

from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..errors import CheckpointError, EngineLoaderError
from ..formats.dcp_parts import METADATA_NAME
from ..machine import sync_directory
from .broken_saves import DATA_FILE, files_named_by, left_behind
from .data_file import DataFile
from .file_layout import file_contents, is_tensor

logger = logging.getLogger(__name__)

_VERSION = "1.0.0"


class FileSystemWriter(torch_filesystem.FileSystemWriter):
    """Replaces ``torch.distributed.checkpoint.FileSystemWriter`` in ``dcp.save`` and ``dcp.async_save``.

    torch's reader reads what this class writes, and this package's reader what torch writes (safetensors items: see
    ``serialization_format``). If the directory holds a checkpoint, the new files get other names, ``.metadata`` is
    replaced atomically when all of them are complete, and the old files are deleted last: a crash leaves the old
    checkpoint or the new one. Data files that an interrupted save left in the directory, which no metadata names, are
    deleted then as well. So only one save at a time may write to a directory.

    Args:
        path: the checkpoint's directory; it is made if it is missing.
        single_file_per_rank: ``thread_count`` files per rank, not one per tensor.
        sync_files: force every file, and the directory, to permanent storage before the save ends.
        thread_count: how many threads write.
        per_thread_copy_ahead: bytes to copy from the GPU ahead of writing, if one thread writes.
        cache_staged_state_dict: keep the CPU copy of ``async_save`` for the next ``async_save``.
        overwrite: replace a checkpoint in the directory; False: raise an error if there is one.
        _extensions: transforms of the items; only with ``TORCH_SAVE``.
        serialization_format: ``TORCH_SAVE``, or ``SAFETENSORS``: each file is a valid safetensors file with the
            offsets of its chunks in ``__metadata__``; items that are not tensors are in separate files. This package's
            reader reads such a checkpoint (and torch's HuggingFaceStorageReader, if the files have the names that it
            expects).

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
            raise ValueError(f"thread_count is {thread_count}; it must be at least 1")
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
        """Make the directory, and with ``overwrite=False`` refuse a directory that holds a checkpoint.

        Raises:
            CheckpointError: the directory holds a checkpoint.
        """
        self.fs.mkdir(self.path)
        if not self.overwrite and self._metadata_exists():
            raise CheckpointError(
                "Checkpoint already exists and self.overwrite=False",  # torch's words, which callers look for
                file=os.fspath(self.path),
                hint="write to another directory, or give overwrite=True",
            )
        if self.rank is not None and self._writes_alone():
            plan = dataclasses.replace(plan, storage_data=self._storage_data(self.rank))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Add to the plan of each rank the prefix of the names of its files."""
        return [
            dataclasses.replace(plan, storage_data=self._storage_data(rank)) if plan.storage_data is None else plan
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of the plan.

        Raises:
            CheckpointError: safetensors cannot hold a tensor, or a tensor differs from its plan.
            OSError: a file cannot be written.
        """
        prefix: str = plan.storage_data.prefix
        number = self._first_free_number(prefix)
        jobs: queue.SimpleQueue[tuple[str, list[WriteItem]]] = queue.SimpleQueue()
        files = self.thread_count if self.single_file_per_rank else None
        for items in file_contents(plan.items, files=files, safetensors=self._writes_safetensors()):
            jobs.put((f"{prefix}{number}{torch_filesystem.DEFAULT_SUFFIX}", items))
            number += 1
        return self._write_files(jobs, planner)

    def _write_files(
        self, jobs: queue.SimpleQueue[tuple[str, list[WriteItem]]], planner: SavePlanner
    ) -> Future[list[WriteResult]]:
        """Write files, each a name and its items, with several threads."""
        results: list[WriteResult] = []
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while not failures:
                    name, items = jobs.get_nowait()
                    results.extend(self._write_file(name, items, planner))
            except queue.Empty:
                pass
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(1, self.thread_count)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, which makes the new checkpoint valid, then delete older files that it does not name.

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
        self._delete((before - used) | self._left_by_broken_saves(before | used, used, path))

    def _left_by_broken_saves(
        self, known: Collection[str], used: Collection[str], metadata_path: str | os.PathLike[str]
    ) -> set[str]:
        """Files of saves that were interrupted, in the directories of known files (where ranks have prefixes: of other
        ranks, too); none if they cannot be listed."""
        mine = f"__{self.rank}_" if self._writes_alone() else ""
        published = os.path.basename(os.fspath(metadata_path))
        try:
            found = left_behind(self._times_of({name.rpartition("/")[0] for name in known}), used)
            if not found:
                return found
            # Where each rank writes a checkpoint of its own, files belong to the others.
            others = [name for name in self._names_in("") if name.endswith(METADATA_NAME) and name != published]
            for name in others:
                found -= files_named_by(self.fs, self.fs.concat_path(self.path, name))
        except (OSError, EngineLoaderError) as error:
            logger.warning("files that interrupted saves may have left were not looked for: %s", error)
            return set()
        return {name for name in found if name.rpartition("/")[2].startswith(mine)}

    def _publish(self, metadata: bytes, path: str | os.PathLike[str]) -> None:
        """Write the metadata to a file of another name, and rename that file, which replaces the old one atomically."""
        draft = self.fs.concat_path(self.path, os.path.basename(os.fspath(path)) + ".tmp")
        with self.fs.create_stream(draft, "wb") as stream:
            cast(io.BufferedIOBase, stream).write(metadata)
            self._sync(stream)
        self.fs.rename(draft, path)
        if self.sync_files:
            sync_directory(self.path)

    def _delete(self, names: Collection[str]) -> None:
        """Delete files that no metadata names. A file that cannot be deleted is only logged."""
        for name in names:
            self._delete_file(name)

    def _delete_file(self, name: str) -> None:
        try:
            self.fs.rm_file(self.fs.concat_path(self.path, name))
        except FileNotFoundError:
            return
        except (OSError, CheckpointError) as error:
            logger.warning("a file of the replaced checkpoint could not be deleted: %s", error)

    def _storage_data(self, rank: int) -> Any:
        """The storage data for a rank's plan; its ``prefix`` is the prefix of the names of the rank's files."""
        return torch_filesystem._StoragePrefix(f"__{rank}_")

    def _create(self, name: str, items: Sequence[WriteItem]) -> AbstractContextManager[io.IOBase]:
        """Open a data file for writing."""
        return self.fs.create_stream(self.fs.concat_path(self.path, name), "wb")

    def _names_in(self, directory: str) -> Sequence[str]:
        """The names of the files directly in a directory of the checkpoint; none if there is no such directory."""
        try:
            return os.listdir(os.path.join(self.path, directory))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _times_of(self, directories: Collection[str]) -> dict[str, float]:
        """The files right in these directories of the checkpoint by their relative paths, with the time of each one's
        last change in seconds."""
        times = {}
        for directory in directories:
            for name in self._names_in(directory):
                with suppress(FileNotFoundError):
                    times[os.path.join(directory, name)] = os.stat(os.path.join(self.path, directory, name)).st_mtime
        return times

    def _writes_alone(self) -> bool:
        """True if each rank writes a separate checkpoint."""
        return self.rank is not None and not self.use_collectives

    def _first_free_number(self, prefix: str) -> int:
        """The first number that no data file of this prefix has: files of the old checkpoint must stay until the new
        metadata is written, and a save that crashed may have left files."""
        directory, _, begin = prefix.rpartition("/")
        names = [name for name in self._names_in(directory) if name.startswith(begin)]
        return max((int(match[2]) for match in map(DATA_FILE.match, names) if match), default=-1) + 1

    def _files_of(self, metadata_path: str | os.PathLike[str]) -> set[str]:
        """The data files of the checkpoint that is being replaced; none if its metadata cannot be read."""
        try:
            names = files_named_by(self.fs, metadata_path)
        except (OSError, CheckpointError):
            return set()
        return {name for name in names if DATA_FILE.match(name.rpartition("/")[2])}

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        copy_ahead = self.per_thread_copy_ahead if self.thread_count == 1 else 0
        with self._create(name, items) as opened:
            file = DataFile(name, cast(io.BufferedIOBase, opened), planner, self.transforms, copy_ahead)
            safetensors = self._writes_safetensors() and all(map(is_tensor, items))
            results = file.write_safetensors(items) if safetensors else file.write(items)
            self._sync(opened)
        return results

    def _writes_safetensors(self) -> bool:
        return self.serialization_format == SerializationFormat.SAFETENSORS

    def _sync(self, stream: Any) -> None:
        stream.flush()
        if self.sync_files:
            try:
                descriptor = stream.fileno()
            except (AttributeError, io.UnsupportedOperation):
                return
            os.fsync(descriptor)
