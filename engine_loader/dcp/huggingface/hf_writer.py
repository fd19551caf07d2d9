"""Writes Hugging Face checkpoints in ``dcp.save``, by one rank or by all, each its parts."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import queue
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ...errors import CheckpointError
from ...formats.hf_index import INDEX_NAME
from ...machine import sync_directory
from ...sources.registry import make_source
from ...sources.source import Source
from ..file_layout import file_contents, is_tensor, tensor_nbytes
from ..s3_config import AnyClientConfig
from ..s3_file_system import S3FileSystem
from ..writer import FileSystemWriter
from .consolidation import Destination, consolidate
from .hf_storage import HuggingFaceStorage, file_system_of

logger = logging.getLogger(__name__)

SHARDED_DIRECTORY = "sharded"
_PART = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")


class HuggingFaceStorageWriter(HuggingFaceStorage, FileSystemWriter):  # type: ignore[misc]  # fs of two kinds
    """Replaces ``torch.distributed.checkpoint.HuggingFaceStorageWriter`` in ``dcp.save`` and ``dcp.async_save``.

    The files have the same names and hold the same tensors as torch's. Each gets its name when it is complete, the
    index last. One tensor per thread is in memory beside the state dict.

    Args:
        path: a directory, which is made if it is missing, or a URL: ``s3://bucket/prefix``, also gs:// and az://.
        fqn_to_index_mapping: name -> number of the file, from 1, that a tensor goes to; None: all go to one.
        thread_count: how many threads write, each a file at a time.
        save_distributed: each rank writes its parts of tensors; False: one rank has all of the state dict.
        enable_consolidation: then write whole tensors to ``path``, from the parts in ``path``/sharded.
        thread_count_consolidation: how many files of whole tensors are written at a time.
        region: of the bucket; "": the region of the environment.
        s3client_config: options of the client; None: the loader's settings.

    Raises:
        ValueError: ``thread_count`` or ``thread_count_consolidation`` is less than one.
        CheckpointError: (when it saves) an item is no tensor, ``fqn_to_index_mapping`` lacks a tensor, several ranks
            write without ``save_distributed``, safetensors cannot hold a tensor, or a server refuses or fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fqn_to_index_mapping: dict[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
        *,
        region: str = "",
        s3client_config: AnyClientConfig | None = None,
    ) -> None:
        if thread_count_consolidation < 1:
            raise ValueError(f"thread_count_consolidation is {thread_count_consolidation}; it must be at least 1")
        super().__init__(path, thread_count=thread_count, serialization_format=SerializationFormat.SAFETENSORS)
        objects = file_system_of(path, region, s3client_config, {})
        if objects is not None:
            objects.parts_at_once = max(1, objects.parts_at_once // thread_count)
            self.fs, self.path = objects, objects.init_path(path)
            self.sync_files = False
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = thread_count_consolidation
        self.consolidated_output_path: str | None = None
        if enable_consolidation:
            self._write_parts_below(self.path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, to ``checkpoint_id`` where it is given."""
        super().reset(checkpoint_id)
        if checkpoint_id and self.enable_consolidation:
            self._write_parts_below(self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the directory, and refuse what such a checkpoint cannot hold, before anything is written.

        Raises:
            CheckpointError: an item is no tensor, or has no file.
        """
        for item in plan.items:
            name = item.index.fqn
            if not is_tensor(item):
                raise CheckpointError(
                    f"{name!r} is not a tensor, and safetensors files hold nothing else",
                    hint="leave it out of the state dict, or save it beside the checkpoint",
                )
            number = (self.fqn_to_index_mapping or {}).get(name, None if self.fqn_to_index_mapping else 1)
            if not isinstance(number, int) or number < 1:
                raise CheckpointError(
                    f"fqn_to_index_mapping has {number!r} for {name!r}, and it takes the number of a file, from 1"
                )
        self.fs.mkdir(self.path)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank which files it writes.

        Raises:
            CheckpointError: several ranks have tensors to write, without ``save_distributed``.
        """
        if not self.save_distributed and sum(bool(plan.items) for plan in plans) > 1:
            raise CheckpointError(
                "several ranks have tensors to save, and would write the same files",
                file=os.fspath(self.path),
                hint="give save_distributed=True, or a state dict that is whole on one rank",
            )
        prepared = []
        for number, plan in enumerate(plans, start=1):
            data: dict[str, Any] = {}
            if self.fqn_to_index_mapping is not None:
                data["fqn_to_index_mapping"] = self.fqn_to_index_mapping
            if self.save_distributed:
                data |= {"shard_index": number, "shard_count": len(plans)}
            prepared.append(dataclasses.replace(plan, storage_data=data))
        return prepared

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of the plan.

        Raises:
            CheckpointError: safetensors cannot hold a tensor, or a tensor differs from its plan.
            OSError: a file cannot be written.
        """
        data: Mapping[str, Any] = plan.storage_data or {}
        numbers: Mapping[str, int] = data.get("fqn_to_index_mapping") or {}
        files = max(numbers.values(), default=1)
        buckets: dict[int, list[WriteItem]] = {}
        for item in plan.items:
            buckets.setdefault(numbers.get(item.index.fqn, 1), []).append(item)
        jobs: queue.SimpleQueue[tuple[str, list[WriteItem]]] = queue.SimpleQueue()
        for number, items in buckets.items():
            # A rank may have several parts of a tensor, and a file holds a name once: the rest gets the numbers after
            # those of all ranks.
            for turn, content in enumerate(file_contents(items, files=1, safetensors=True)):
                shard = data["shard_index"] + turn * data["shard_count"] if "shard_index" in data else None
                jobs.put((file_name(number, files, shard), content))
        return self._write_files(jobs, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; with ``enable_consolidation``, the files with whole tensors before it.

        Raises:
            CheckpointError: the parts cannot be read.
            OSError: a file cannot be written.
        """
        stored = [(result.index.fqn, result.storage_data) for rank in results for result in rank]
        files = sorted({info.relative_path for _, info in stored})
        if self.save_distributed:
            self._delete(self._left_by_larger_worlds(files))
            if self.enable_consolidation:
                numbers = self.fqn_to_index_mapping or dict.fromkeys(metadata.state_dict_metadata, 1)
                most = max(numbers.values(), default=1)
                consolidate(
                    self._open_source(),
                    [os.path.join(os.fspath(self.path), name) for name in files],
                    self._destination(),
                    {name: file_name(numbers[name], most) for name in metadata.state_dict_metadata},
                    threads=self.thread_count_consolidation,
                )
            elif self.fs.exists(self.fs.concat_path(self.path, INDEX_NAME)):
                logger.warning(
                    "%s is of another save, and says that the tensors lie in other files: whoever reads by it gets "
                    "those; remove it with its files, or save to a directory of its own",
                    self.fs.concat_path(self.path, INDEX_NAME),
                )
            return
        total = sum(info.length for _, info in stored)
        content = {"metadata": {"total_size": total}, "weight_map": {name: info.relative_path for name, info in stored}}
        text = json.dumps(content, indent=2).encode()
        with self._create(INDEX_NAME, ()) as stream:
            cast(io.BufferedIOBase, stream).write(text)
            self._sync(stream)

    @property
    def metadata_path(self) -> str:
        """The name of the index."""
        return INDEX_NAME

    def _create(self, name: str, items: Sequence[WriteItem]) -> AbstractContextManager[io.IOBase]:
        expected = sum(map(tensor_nbytes, items))
        return self._created(os.fspath(self.path), name, expected)

    @contextmanager
    def _created(self, directory: str, name: str, expected_bytes: int) -> Iterator[io.IOBase]:
        """A file that gets its name when the block ends, and is not there if an exception ends the block."""
        fs = self.fs
        if isinstance(fs, S3FileSystem):
            with fs.create_stream(fs.concat_path(directory, name), "wb", expected_bytes=expected_bytes) as stream:
                yield stream
            return
        draft = os.path.join(directory, f".{name}.unfinished")
        try:
            with open(draft, "wb") as file:
                yield file
            os.rename(draft, os.path.join(directory, name))
        except BaseException:
            if os.path.exists(draft):
                os.unlink(draft)
            raise
        if self.sync_files:
            sync_directory(directory)

    def _destination(self) -> Destination:
        directory = self.consolidated_output_path
        assert directory is not None
        return lambda name, nbytes: self._created(directory, name, nbytes)

    def _left_by_larger_worlds(self, files: Sequence[str]) -> set[str]:
        """Parts of an older save by more ranks: they would be taken for parts of this one."""
        times = self.fs.times(self.path) if isinstance(self.fs, S3FileSystem) else self._times_of([""])
        begun = min((times[name] for name in files if name in times), default=None)
        return {
            name
            for name, changed in times.items()
            if begun is not None and _PART.fullmatch(name) and name not in files and changed < begun
        }

    def _open_source(self) -> Source:
        return self.fs.source() if isinstance(self.fs, S3FileSystem) else make_source("posix")

    def _write_parts_below(self, path: str | os.PathLike[str]) -> None:
        self.consolidated_output_path = os.fspath(path)
        self.path = self.fs.concat_path(path, SHARDED_DIRECTORY)


def file_name(number: int, files: int, shard: int | None = None) -> str:
    """The name of a file, as torch gives it.

    Args:
        number: of the file, from 1.
        files: how many there are.
        shard: of a rank's parts, the number of the rank, from 1; None: the file holds whole tensors.
    """
    name = f"model-{number:05}-of-{files:05}.safetensors"
    return name if shard is None else f"shard-{shard:05}-{name}"
