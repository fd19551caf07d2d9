"""From what was found at a path to its store of tensors."""

from __future__ import annotations

from ..errors import CheckpointError
from ..settings import LoaderSettings
from ..sources.source import Source
from .find import SafetensorsFiles, TrainingCheckpoint
from .safetensors_store import SafetensorsStore
from .shards import open_files
from .store import TensorStore
from .streaming.gds import gds_error, gds_is_asked_for
from .training.key_mapping import KeyMapping
from .training.store import TrainingStore


def open_store(
    source: Source,
    found: SafetensorsFiles | TrainingCheckpoint,
    settings: LoaderSettings,
    *,
    key_mapping: KeyMapping | None = None,
    optimizer_state: bool = False,
) -> TensorStore:
    """Open a checkpoint's files.

    Args:
        source: where they are.
        found: the files; see ``find_checkpoint``.
        settings: how to read.
        key_mapping: of a training checkpoint, from its names to those that are wanted; None: the setting.
        optimizer_state: of a training checkpoint, also serve what is not the model's: optimizers, averaged copies,
            states of random generators.

    Raises:
        CheckpointError: a file, a header, the index or the metadata is missing or wrong, or ``key_mapping`` or
            ``optimizer_state`` is given and this is no training checkpoint.
        SettingsError: GPUDirect Storage was asked for, and this is a training checkpoint.
    """
    match found:
        case SafetensorsFiles():
            if key_mapping or optimizer_state:
                raise CheckpointError("key_mapping and optimizer_state go with a DCP directory, which this is not")
            return SafetensorsStore(open_files(source, found), source.name, settings)
        case TrainingCheckpoint(directory):
            if gds_is_asked_for(settings):
                raise gds_error(f"it reads safetensors files, and {directory} is a training checkpoint")
            return TrainingStore(source, directory, settings, key_mapping=key_mapping, optimizer_state=optimizer_state)
