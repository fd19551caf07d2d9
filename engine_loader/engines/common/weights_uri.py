"""Weights that lie elsewhere than the model's configuration and tokenizer: the setting ``weights_uri``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch

from ...errors import CheckpointError, SettingsError
from ...formats.dcp_metadata import METADATA_NAME
from ...loading.find import is_dcp, locate
from ...settings import LoaderSettings
from ...sources.registry import make_source, remote_backend


def weights_at(
    uri: str, settings: LoaderSettings, *, subfolder: str | None = None, patterns: Sequence[str] | None = None
) -> list[str] | str:
    """The safetensors files at ``uri``: a prefix, a directory, or one file. Or where a training checkpoint is there.

    Args:
        uri: the value of the setting.
        settings: how to read.
        subfolder: below it.
        patterns: take the files whose names match one of these, instead of those of the index or all.

    Raises:
        SettingsError: the setting ``backend`` is of another kind of source.
        CheckpointError: there are no weights, or they cannot be read; it names the setting.
    """
    remote = remote_backend(uri)
    if remote is not None and settings.backend not in ("auto", remote):
        raise SettingsError(f"backend: {settings.backend} does not read weights_uri: {uri}; set backend to auto")
    place = os.path.join(uri, subfolder) if subfolder else uri
    source = make_source(settings.backend, settings=settings)
    try:
        if is_dcp(source, place):
            return place
        if not patterns:
            return locate(source, place)[0]
        names = [name for name in source.list(place) if any(fnmatch(name, pattern) for pattern in patterns)]
        if not names:
            raise CheckpointError(f"no file matches {', '.join(patterns)}", file=place)
        return [os.path.join(place, name) for name in names]
    except CheckpointError as error:
        raise CheckpointError(
            f"weights_uri: {error.message}", file=error.file, offset=error.offset, hint=error.hint
        ) from error


def is_training_checkpoint(place: str, settings: LoaderSettings) -> bool:
    """Whether ``place`` is the directory of a training checkpoint (torch.distributed.checkpoint)."""
    return is_dcp(make_source(settings.backend, settings=settings), place)


def has_weights(model: str) -> bool:
    """Whether the directory ``model`` holds a checkpoint, or ``model`` is the name of one on the hub."""
    try:
        return any(name.endswith(".safetensors") or name == METADATA_NAME for name in os.listdir(model))
    except OSError:
        return True
