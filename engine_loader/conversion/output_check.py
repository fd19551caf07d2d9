"""Reads what a conversion wrote, before it gets its name: by the rules that this package's readers go by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from ..loading.find import ShardedState, TrainingCheckpoint, find_checkpoint
from ..loading.open_store import open_store
from ..settings import load_settings
from ..sources.posix import PosixSource
from .written_tensors import Outgoing


def check_output(directory: Path, tensors: Sequence[Outgoing]) -> None:
    """Open the checkpoint in ``directory``, and compare its tensors with what was to be written.

    No tensor's data is read. What a process was killed over, or a fault of this package, is found out here.

    Raises:
        CheckpointError: it cannot be read, or is not what was to be written.
    """
    found_types = _types_in(directory)
    for tensor in tensors:
        expected = tensor.dtype, tensor.info.shape, tensor.nbytes
        found = found_types.pop(tensor.name, None)
        if found != expected:
            raise _not_as_meant(directory, f"{tensor.name!r} was to be {expected}, and is {found}")
    if found_types:
        raise _not_as_meant(directory, f"it has {len(found_types)} more tensors, such as {next(iter(found_types))!r}")


def _types_in(directory: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> safetensors' type, shape in a header, and bytes of each tensor."""
    source, settings = PosixSource(), load_settings({"key_mapping": None, "transport": "auto"}).settings.loader
    found = find_checkpoint(source, str(directory))
    assert not isinstance(found, ShardedState)
    with open_store(source, found, settings, optimizer_state=isinstance(found, TrainingCheckpoint)) as store:
        infos = store.located(list(store.by_name().values()))
        for info in infos:
            store.dtype_and_shape(info)
        for error in store.lacking.values():
            raise error
    return {info.name: (info.dtype, info.shape, info.nbytes) for info in infos}


def _not_as_meant(directory: Path, message: str) -> CheckpointError:
    return CheckpointError(
        f"the output would not be what was to be written: {message}",
        file=str(directory),
        hint="nothing was written to the destination; please report this with the source's `engine-loader inspect`",
    )
