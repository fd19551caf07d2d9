"""Reads Hugging Face checkpoints in ``dcp.load``: whole tensors, or the parts that several ranks saved."""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ...errors import CheckpointError
from ...loading.find import NoCheckpointError, ShardedState, TrainingCheckpoint, find_checkpoint
from ...loading.shards import OpenFiles, read_index, warn_of_other_parts
from ...loading.training.items import JoinedParts, PartInfo
from ...loading.training.parts import metadata_of_parts
from ...machine import usable_cpus
from ...sources.source import Source
from ..reader import FileSystemReader, told_at_set_up
from ..s3_config import AnyClientConfig
from .hf_storage import HuggingFaceStorage, file_system_of

_SCALES = ("_scale_inv", "_scale")


class HuggingFaceStorageReader(HuggingFaceStorage, FileSystemReader):  # type: ignore[misc]  # fs of two kinds
    """Replaces ``torch.distributed.checkpoint.HuggingFaceStorageReader`` in ``dcp.load``.

    Reads the safetensors files of a directory, or below ``s3://bucket/prefix`` (also gs:// and az://): those of a model
    as on the hub, and those that several ranks saved without consolidation. See FileSystemReader for how: only the
    bytes that the plan needs, by native threads, straight into the tensors of the state dict.

    Args:
        path: the directory or the URL.
        thread_count: at least so many threads read; by the loader's setting ``threads``, more may.
        region: of the bucket; "": the region of the environment.
        s3client_config: options of the client; None: the loader's settings.
        options: settings of the loader by name, e.g. ``buffer_bytes="1GiB"``.

    Raises (when it loads; ``dcp.load`` may wrap it in its CheckpointException):
        CheckpointError: there are no such files, one is cut short or damaged, or parts of a tensor are missing, overlap
            or are of different types; or a tensor is quantised in blocks, and the state dict wants plain numbers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thread_count: int = 1,
        *,
        region: str = "",
        s3client_config: AnyClientConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        self.thread_count = thread_count
        self._scales: dict[str, str] = {}
        objects = file_system_of(path, region, s3client_config, options)
        if objects is not None:
            self.fs = objects
            self.path = objects.init_path(path)
            self._settings = objects.setup.settings
        if thread_count > (self._settings.threads or usable_cpus()):
            self._settings = self._settings.model_copy(update={"threads": thread_count})

    @told_at_set_up
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata, from the headers of its files.

        Raises:
            CheckpointError: a header is wrong, or parts do not fit together.
        """
        source, directory = self._source(), os.fspath(self.path)
        found = find_checkpoint(source, directory)
        if isinstance(found, TrainingCheckpoint):
            raise NoCheckpointError(
                "no .safetensors file in this directory",
                file=directory,
                hint="it has .metadata: engine_loader.dcp.FileSystemReader reads it",
            )
        files = found.files if isinstance(found, ShardedState) else found
        listed = read_index(source, files.index_file) if files.index_file else None
        if listed is not None:
            warn_of_other_parts(listed, files.names)
        with OpenFiles(source, files.paths) as opened:
            headers = opened.headers
        files_of = {} if listed is None else {name: listed.path_of(file) for name, file in listed.weight_map.items()}
        metadata = metadata_of_parts(headers, directory, files_of, join_rows=True)
        metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keep the metadata, and which tensors have scales beside them."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        names = metadata.state_dict_metadata
        self._scales = {
            name.removesuffix(end): name
            for end in _SCALES
            for name in names
            if name.endswith(end) and name.removesuffix(end) in names
        }

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Carry out a plan.

        Raises:
            CheckpointError: a tensor cannot be read; the state dict then holds unspecified values.
        """
        if self._scales:
            for item in plan.items:
                self._check_wanted(item, planner)
        return super().read_data(plan, planner)

    def _check_wanted(self, item: ReadItem, planner: LoadPlanner) -> None:
        """Refuse to hand out elements without the scales that they must be multiplied by."""
        name = item.storage_index.fqn
        stored: object = self._info(item)
        scale = self._scales.get(name)
        if scale is None or not isinstance(stored, PartInfo | JoinedParts):
            return
        in_bytes = stored.dtype.itemsize == 1 and stored.dtype.is_floating_point
        if in_bytes and (wanted := planner.resolve_tensor(item).dtype) != stored.dtype:
            raise CheckpointError(
                f"{name!r} is quantised: {stored.dtype} with scales in {scale!r}, and the state dict wants {wanted}",
                file=os.path.join(os.fspath(self.path), stored.relative_path),
                hint="load it with its own element type and the scales beside it, or dequantise the checkpoint first "
                "(QuantizedHuggingFaceStorageReader does both)",
            )

    def _source(self) -> Source:
        objects = self.fs
        return super()._source() if not hasattr(objects, "source") else objects.source()
