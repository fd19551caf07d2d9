"""Writes a training checkpoint (torch.distributed.checkpoint) from any other, one tensor at a time in memory."""

from __future__ import annotations

import dataclasses
import gc
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from ..dcp.writer import FileSystemWriter
from ..errors import CheckpointError
from ..loading.checkpoint import Checkpoint
from ..loading.training.items import dtype_name
from .written_tensors import Outgoing, in_writing_order, read_in_order

_WORTH_FREEING = 1 << 20
"""Bytes of a tensor for which Python is asked to look for what nobody refers to."""


def write_dcp(
    directory: Path,
    checkpoint: Checkpoint,
    tensors: Sequence[Outgoing],
    *,
    items: SerializationFormat,
    others: Mapping[str, Callable[[], bytes]],
    paths: Mapping[str, tuple[Any, ...]],
    written: Callable[[int], object],
) -> None:
    """Write tensors, each in one chunk, all into one file.

    Args:
        directory: empty.
        checkpoint: the source.
        tensors: what to write.
        items: how.
        others: what is no tensor, by its name: how its bytes are read.
        paths: the keys under which each item was in a training's nested state dict, by its name there.
        written: called with the bytes of each tensor that was written.

    Raises:
        CheckpointError: the tensors cannot be read, or cannot be stored like this.
        OSError: they cannot be written.
    """
    ordered = in_writing_order(tensors)
    state: dict[str, Any] = {going.name: _blank(going) for going in ordered}
    for name in others:
        if name in state:
            raise CheckpointError(f"{name!r} is also the name of what is not a tensor", hint="correct key_mapping")
    planner = _Planner(_read(checkpoint, ordered, written), others, paths)
    writer = FileSystemWriter(directory, serialization_format=items)
    planner.set_up_planner({**state, **dict.fromkeys(others)}, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans = [writer.prepare_local_plan(planner.create_local_plan())]
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    with _true_cause():
        results = writer.write_data(planner.finish_plan(plans[0]), planner).wait()
    planner.finish_reading()
    writer.finish(metadata, [results])


@contextmanager
def _true_cause() -> Iterator[None]:
    """torch.save tells of its own state when what it writes to fails: raise that failure instead."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from error


class _Planner(DefaultSavePlanner):
    """Plans with tensors that have no data yet, and reads each when it is to be written."""

    def __init__(
        self,
        tensors: Iterator[tuple[str, torch.Tensor]],
        others: Mapping[str, Callable[[], bytes]],
        paths: Mapping[str, tuple[Any, ...]],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors
        self._others = others
        self._paths = paths

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        plans, metadata = super().create_global_plan(all_plans)
        # Where in the nested state dict each was; a new name is a key of the outermost one.
        paths = {name: self._paths.get(name, (name,)) for name in metadata.state_dict_metadata}
        return plans, dataclasses.replace(metadata, planner_data=paths)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._others[write_item.index.fqn]())
        name, tensor = next(self._tensors)
        assert name == write_item.index.fqn
        return tensor

    def finish_reading(self) -> None:
        """All was written: see that the source is still what it was."""
        assert next(self._tensors, None) is None


def _read(
    checkpoint: Checkpoint, tensors: Sequence[Outgoing], written: Callable[[int], object]
) -> Iterator[tuple[str, torch.Tensor]]:
    for going, tensor in read_in_order(checkpoint, tensors):
        yield going.name, tensor
        written(going.nbytes)
        # Older torches' torch.save (2.9 is one) leaves what it wrote in a cycle of references, which Python otherwise
        # frees when many objects were made, however many bytes they hold.
        if going.nbytes >= _WORTH_FREEING:
            gc.collect(1)


def _blank(going: Outgoing) -> torch.Tensor:
    stored = getattr(torch, going.info.dtype, None)
    if isinstance(stored, torch.dtype):  # by torch's name, where safetensors has none
        return torch.empty(going.info.shape, dtype=stored, device="meta")
    dtype, shape = going.info.as_torch()
    if dtype_name(dtype) != going.info.dtype:
        raise CheckpointError(
            f"{going.info.name!r} is {going.info.dtype}, for which torch has no type",
            file=going.info.file,
            hint="leave it out by key_mapping, or convert to safetensors",
        )
    return torch.empty(shape, dtype=going.cast or dtype, device="meta")
