"""Weights that lie elsewhere than the model's configuration and tokenizer: the setting ``weights_uri``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ...compile_cache.stores.opening import check_settings
from ...errors import CheckpointError, SettingsError
from ...loading.find import (
    Found,
    NoCheckpointError,
    SafetensorsFiles,
    TrainingCheckpoint,
    find_checkpoint,
    is_pytorch_file,
)
from ...loading.mapping.named_layouts import rules_of
from ...loading.shards import listed_files
from ...loading.store import TensorStore
from ...loading.training.key_mapping import make_renamer
from ...loading.weights import check_weights, open_weights
from ...settings import CompileCacheSettings, LoaderSettings
from ...sources.posix import PosixSource
from ...sources.registry import is_remote, make_source, remote_backend
from ...sources.source import Source


def weights_at(
    uri: str, settings: LoaderSettings, *, subfolder: str | None = None, patterns: Sequence[str] | None = None
) -> list[str] | TrainingCheckpoint:
    """The safetensors files at ``uri`` (a prefix, a directory, or one file), or the training checkpoint there.

    Args:
        uri: the value of the setting.
        settings: how to read.
        subfolder: below it.
        patterns: take the files that match the first of these that any file matches, instead of those of the index or
            all; a pattern may name folders below ``uri``.

    Raises:
        SettingsError: the setting ``backend`` is of another kind of source.
        CheckpointError: there are no weights, or they cannot be read; it names the setting.
    """
    remote = remote_backend(uri)
    if remote is not None and settings.backend not in ("auto", remote):
        raise SettingsError(f"backend: {settings.backend} does not read weights_uri: {uri}; set backend to auto")
    source = make_source(settings.backend, settings=settings)
    try:
        return _weights_at(source, os.path.join(uri, subfolder) if subfolder else uri, patterns)
    except CheckpointError as error:
        kind = NoCheckpointError if isinstance(error, NoCheckpointError) else CheckpointError
        raise kind(f"weights_uri: {error.message}", file=error.file, offset=error.offset, hint=error.hint) from error


def _weights_at(source: Source, path: str, patterns: Sequence[str] | None) -> list[str] | TrainingCheckpoint:
    try:
        found: Found | None = find_checkpoint(source, path)
    except NoCheckpointError:
        if not patterns:
            raise
        found = None
    if isinstance(found, TrainingCheckpoint):
        return found
    if found is not None and not patterns:
        return list(listed_files(source, found)[0])
    for pattern in patterns or ():  # as engines do: of several, the first that matches
        files = _matching(source, path, pattern.split("/"))
        if files:
            return files
    raise CheckpointError(f"no file matches {', '.join(patterns or ())}", file=path)


def _matching(source: Source, directory: str, pattern: Sequence[str]) -> list[str]:
    """The files below ``directory`` whose path matches, part by part; hidden ones do not, as with ``glob``."""
    first, *rest = pattern
    names = source.folders(directory) if rest else source.list(directory)
    matching = [name for name in names if not name.startswith(".") and fnmatchcase(name, first)]
    below = [os.path.join(directory, name) for name in matching]
    return [path for folder in below for path in _matching(source, folder, rest)] if rest else below


def training_checkpoint_at(path: str, settings: LoaderSettings) -> TrainingCheckpoint | None:
    """The training checkpoint (torch.distributed.checkpoint) at ``path``, if there is one."""
    try:
        found = find_checkpoint(make_source(settings.backend, settings=settings), path)
    except NoCheckpointError:
        return None
    return found if isinstance(found, TrainingCheckpoint) else None


def headers_of(weights: list[str] | TrainingCheckpoint, settings: LoaderSettings) -> dict[str, dict[str, Any]]:
    """Name -> ``dtype`` (safetensors' name) and ``shape`` of all tensors that an engine would be given.

    Raises:
        CheckpointError: a file, a header, the index or the metadata is wrong.
    """
    with open_weights(weights, settings) as store:
        return {info.name: {"dtype": info.dtype, "shape": list(info.shape)} for info in store.infos}


def check_early(
    model: str,
    settings: LoaderSettings,
    cache: CompileCacheSettings,
    begin: Callable[[Sequence[str] | TensorStore | None], object] = lambda found: None,
) -> None:
    """Look at the headers of the weights that a model will be loaded from, in the process that a user looks at.

    What is wrong there ends the start in a second or two, with the cause in the last line; from an engine's other
    processes it would come after a minute, in the middle of their tracebacks. Where only the engine can tell which
    files are the model's, nothing is checked.

    Args:
        model: the model's directory, or its name on a hub (then only ``weights_uri`` is checked).
        settings: how to read.
        cache: those of the compile cache.
        begin: called once with what was found, before the headers are read: safetensors files, the open store of a
            training checkpoint, or None where only the engine can tell.

    Raises:
        SettingsError: the setting ``backend`` is of another kind of source than ``weights_uri``, ``key_mapping`` makes
            no sense, or the compile cache can never work.
        CheckpointError: a file, a header, the index or the metadata is wrong.
    """
    check_settings(cache)
    if settings.key_mapping is not None:
        rules_of(settings.key_mapping)
        make_renamer(settings.key_mapping)
    weights = _surely_read(model, settings)
    if isinstance(weights, TrainingCheckpoint):
        check_weights(weights, settings, begin)
        return
    begin(weights or None)
    if weights:
        check_weights(weights, settings)


def _surely_read(model: str, settings: LoaderSettings) -> list[str] | TrainingCheckpoint | None:
    if settings.sharded_pattern is not None:
        return None
    try:
        if settings.weights_uri is not None:
            return None if is_remote(settings.weights_uri) else weights_at(settings.weights_uri, settings)
        source = make_source(settings.backend, settings=settings)
        found = find_checkpoint(source, model) if source.is_dir(model) else None
    except NoCheckpointError:
        return None  # perhaps the engine reads files of other kinds
    if isinstance(found, TrainingCheckpoint):
        return found
    if not isinstance(found, SafetensorsFiles) or any("consolidated" in os.path.basename(path) for path in found.paths):
        return None
    # What the index names and is not there, an engine passes over.
    return [path for path in listed_files(source, found)[0] if path in found.paths]


def has_weights(model: str) -> bool:
    """Whether the directory ``model`` holds weights of any kind, or ``model`` is the name of a model on the hub."""
    try:
        find_checkpoint(PosixSource(), model)
    except NoCheckpointError:
        return any(map(is_pytorch_file, PosixSource().list(model)))
    except CheckpointError:  # it cannot be listed: whoever loads it says why
        return True
    return True
