"""From what was found at a path to its store of tensors."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..formats.dcp_parts import are_parts
from ..sources.source import Source
from .find import SafetensorsFiles, TrainingCheckpoint
from .safetensors_store import SafetensorsStore
from .shards import OpenFiles, open_files
from .store import TensorStore
from .streaming.gds import gds_error, gds_is_asked_for

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from ..settings import LoaderSettings
    from .sharing import NodeRanks
    from .training.key_mapping import KeyMapping


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
            files = open_files(source, found)
            return store_of_files(source, files, settings, key_mapping=key_mapping, optimizer_state=optimizer_state)
        case TrainingCheckpoint(directory):
            if gds_is_asked_for(settings):
                raise gds_error(f"it reads safetensors files, and {directory} is a training checkpoint")
            return _training_store(source, directory, settings, key_mapping, optimizer_state=optimizer_state)


def store_of_files(
    source: Source,
    files: OpenFiles,
    settings: LoaderSettings,
    *,
    key_mapping: KeyMapping | None = None,
    optimizer_state: bool = False,
    ranks: NodeRanks | None = None,
) -> TensorStore:
    """The store of open safetensors files; of those that hold parts of tensors, one that puts them together.

    Args:
        source: where they are.
        files: the open files, which the store closes; they are closed on any error.
        settings: how to read.
        key_mapping: as for ``open_store``, of files that hold parts.
        optimizer_state: likewise.
        ranks: of this machine, that load the same files; None: this process alone.

    Raises:
        CheckpointError: the parts do not fit together, or ``key_mapping`` or ``optimizer_state`` is given and there are
            none.
        SettingsError: GPUDirect Storage was asked for, and there are parts.
    """
    with ExitStack() as on_error:
        on_error.callback(files.close)
        if not are_parts(files.headers):
            if key_mapping or optimizer_state:
                raise CheckpointError("key_mapping and optimizer_state go with a DCP directory, which this is not")
            store: TensorStore = SafetensorsStore(files, source.name, settings, ranks=ranks)
            on_error.pop_all()
            return store
        from .training.parts import common_directory, metadata_of_parts

        directory = common_directory(header.file for header in files.headers)
        if gds_is_asked_for(settings):
            raise gds_error(f"it reads whole tensors, and the files in {directory} hold parts of them")
        saved = metadata_of_parts(files.headers, directory)
        return _training_store(source, directory, settings, key_mapping, optimizer_state=optimizer_state, saved=saved)


def map_store(
    store: TensorStore, source: Source, directory: str | None, key_mapping: KeyMapping, *, inverse: bool
) -> TensorStore:
    """A store whose tensors go through the rules of a ``key_mapping``; the store itself where that has none.

    Args:
        store: the tensors; it is closed on any error.
        source: where they are.
        directory: that may hold the model's config.json.
        key_mapping: a layout's name, or rules; see ``open_checkpoint``.
        inverse: from transformers' tensors to a training's, where it is a layout's name.

    Raises:
        CheckpointError: as ``MappedStore``, or the rows of a head are not known.
        SettingsError: a rule makes no sense.
    """
    from .mapping.mapped_store import MappedStore, head_dim_beside
    from .mapping.named_layouts import is_layout, rules_of, unwrapped

    try:
        rules = rules_of(key_mapping, lambda: head_dim_beside(source, directory or ""))
    except BaseException:
        store.close()
        raise
    if rules is None:
        return store
    if inverse and is_layout(key_mapping):
        return MappedStore(store, [rule.inverse() for rule in rules if rule.target])
    return MappedStore(store, rules, lambda name: unwrapped(name, key_mapping))


def _training_store(
    source: Source,
    directory: str,
    settings: LoaderSettings,
    key_mapping: KeyMapping | None,
    *,
    optimizer_state: bool,
    saved: Metadata | None = None,
) -> TensorStore:
    from .mapping.named_layouts import rules_of
    from .training.key_mapping import make_renamer
    from .training.store import TrainingStore

    mapping = settings.key_mapping if key_mapping is None else key_mapping
    if mapping is None or rules_of(mapping) is None:
        return TrainingStore(
            source, directory, settings, key_mapping=key_mapping, optimizer_state=optimizer_state, saved=saved
        )
    renamer = make_renamer(mapping)
    # The training's own names tell what is not the model's; of them, those are left out for which there is no new one.
    store = TrainingStore(
        source,
        directory,
        settings,
        key_mapping=lambda name: None if renamer(name) is None else name,
        optimizer_state=optimizer_state,
        saved=saved,
    )
    return map_store(store, source, directory, mapping, inverse=False)
