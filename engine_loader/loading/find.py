"""From a path to what lies there: safetensors files, one rank's state, or a training checkpoint. Opens no file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import CheckpointError
from ..formats.dcp_parts import METADATA_NAME
from ..formats.hf_index import INDEX_NAME
from ..formats.sharded_state import ShardRank, shards_by_rank, shards_of
from ..sources.source import Source

PathLike: TypeAlias = str | os.PathLike[str]


_FOLDERS_LOOKED_INTO = 20
_TRAINING_STATE = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
"""What engines do not take for weights either."""


class NoCheckpointError(CheckpointError):
    """A directory without a checkpoint that can be loaded."""


@dataclass(frozen=True, slots=True)
class SafetensorsFiles:
    """Safetensors files.

    Attributes:
        paths: the files; of a directory with an index, all its safetensors files, of which the index chooses.
        directory: that holds them; None where a file or a list of files was given.
        index_file: the path of model.safetensors.index.json, where there is one.
        names: of all files in the directory.
    """

    paths: tuple[str, ...]
    directory: str | None = None
    index_file: str | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardedState:
    """A sharded_state checkpoint, in which every rank has files of its own.

    Attributes:
        directory: that holds them.
        shards: the names of each rank's files.
        files: those of all ranks.
    """

    directory: str
    shards: Mapping[ShardRank, Sequence[str]]
    files: SafetensorsFiles

    def of_rank(self, rank: ShardRank | None, ranks: int | None = None) -> SafetensorsFiles:
        """One rank's files.

        Args:
            rank: whose; None where there is only one.
            ranks: how many there must be, if known.

        Raises:
            CheckpointError: there are several and none was named, not this one, or not so many.
        """
        if rank is None and len(self.shards) > 1:
            raise CheckpointError(
                f"this is a sharded_state checkpoint of {len(self.shards)} ranks",
                file=self.directory,
                hint="say which: open_checkpoint(…, rank=0)",
            )
        shards = {key: list(names) for key, names in self.shards.items()}
        names = shards_of(shards, rank or next(iter(shards)), ranks, self.directory)
        return SafetensorsFiles(tuple(os.path.join(self.directory, name) for name in names), self.directory)


@dataclass(frozen=True, slots=True)
class TrainingCheckpoint:
    """The directory of a torch.distributed.checkpoint."""

    directory: str


Found: TypeAlias = SafetensorsFiles | ShardedState | TrainingCheckpoint


def find_checkpoint(
    source: Source, path: PathLike | Sequence[PathLike], *, sharded_pattern: str | None = None
) -> Found:
    """What lies at ``path``.

    Args:
        source: where to look.
        path: a file, a directory (or an object store's prefix), or a list of files. Whether files are there is found
            out when they are opened.
        sharded_pattern: of the names of sharded_state files; None: vLLM's, where there is no index.

    Raises:
        NoCheckpointError: a directory has nothing to load; the message says what was found instead.
        CheckpointError: the list is empty, or the directory cannot be listed.
    """
    if not isinstance(path, str | os.PathLike):
        paths = tuple(os.fspath(item) for item in path)
        if not paths:
            raise CheckpointError("the list of files is empty")
        return SafetensorsFiles(paths)
    text = os.fspath(path)
    if not source.is_dir(text):
        return SafetensorsFiles((text,))
    directory = without_end(text)
    names = source.list(directory)
    weights = sorted(filter(is_shard_name, names), key=natural_key)
    indexed = INDEX_NAME in names
    if METADATA_NAME in names and not indexed and not weights:
        return TrainingCheckpoint(directory)
    files = SafetensorsFiles(
        tuple(os.path.join(directory, name) for name in weights),
        directory,
        os.path.join(directory, INDEX_NAME) if indexed else None,
        tuple(names),
    )
    shards = {} if indexed and sharded_pattern is None else shards_by_rank(weights, sharded_pattern)
    if shards:
        return ShardedState(directory, shards, files)
    if not weights and not indexed:
        raise NoCheckpointError(
            "no .safetensors file in this directory",
            file=directory,
            hint=_what_is_there(source, directory, names),
        )
    return files


def is_shard_name(name: str) -> bool:
    """Whether a file of this name in a directory counts as weights.

    Hidden files do not: macOS leaves a ``._NAME`` beside files that it copies, and downloads that were cut short begin
    with a dot, too.
    """
    return name.endswith(".safetensors") and not name.startswith(".")


def is_pytorch_file(name: str) -> bool:
    """Whether a file holds weights as ``torch.save`` wrote them; not the state of a training."""
    return name.endswith((".bin", ".pt", ".pth")) and not name.startswith(".") and name not in _TRAINING_STATE


def without_end(directory: str) -> str:
    """A URL without slashes at its end: the keys below it would begin with empty parts. Other paths as they are."""
    return directory.rstrip("/") if "://" in directory else directory


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts "shard-10" after "shard-9"."""
    parts = re.split(r"(\d+)", name)
    return [
        (0, len(digits := part.lstrip("0")), digits) if number % 2 else (1, 0, part)
        for number, part in enumerate(parts)
    ]


def _what_is_there(source: Source, directory: str, names: Sequence[str]) -> str:
    folders = source.folders(directory)
    with_weights = _with_weights(source, directory, folders[:_FOLDERS_LOOKED_INTO])
    if with_weights:
        named = ", ".join(map(repr, with_weights[:5])) + (", …" if len(with_weights) > 5 else "")
        return f"there are weights below it, in {named}: give that directory"
    if any(map(is_pytorch_file, names)):
        return f"it has PyTorch files; write them as safetensors: engine-loader convert {directory} OUTPUT"
    if folders and not names:
        named = ", ".join(map(repr, folders[:5])) + (", …" if len(folders) > 5 else "")
        return f"it has no files, but the directories {named}: is the checkpoint in one of them?"
    if not names:
        return "it is empty"
    return f"it has {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _with_weights(source: Source, directory: str, folders: Sequence[str]) -> list[str]:
    """Those of the ``folders`` that hold weights, as paths; one that cannot be listed does not."""
    found = []
    for folder in folders:
        path = os.path.join(directory, folder)
        with suppress(CheckpointError):
            names = source.list(path)
            if METADATA_NAME in names or any(map(is_shard_name, names)):
                found.append(path)
    return found
