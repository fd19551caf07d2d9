"""What a survey of a checkpoint found."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import CheckpointError
from ...formats.hf_index import ShardIndex
from ...formats.safetensors import Header, TensorInfo


@dataclass
class Survey:
    """What was found.

    Attributes:
        headers: of the files that could be read, in order.
        index: the checkpoint's index, where it has one.
        problems: all that is wrong; a sound checkpoint has none.
        notes: what is not wrong, but worth knowing.
        whole: of a training's checkpoint, the tensors; its files hold parts of them.
        other_items: the names of what it has beside tensors.
    """

    headers: list[Header]
    index: ShardIndex | None = None
    problems: list[CheckpointError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: list[TensorInfo] | None = None
    other_items: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> list[TensorInfo]:
        """The tensors that a loader takes: with an index, those that it lists."""
        if self.whole is not None:
            return self.whole
        infos = [info for header in self.headers for info in header.tensors]
        return infos if self.index is None else [info for info in infos if is_listed(self.index, info)]


def is_listed(index: ShardIndex, info: TensorInfo) -> bool:
    """Whether the index puts a tensor into the file that has it."""
    shard = index.weight_map.get(info.name)
    return shard is not None and index.path_of(shard) == info.file
