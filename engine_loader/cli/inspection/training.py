"""A training's checkpoint (torch.distributed.checkpoint): what its metadata says, and whether its files fit that."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ...errors import CheckpointError
from ...formats.safetensors import Header, TensorInfo
from ...loading.find import natural_key
from ...loading.training.chunks import misfit
from ...loading.training.parts import metadata_of_parts
from ...loading.training.store import TrainingStore
from ...loading.training.tensors import DcpChunk, DcpTensor
from ...settings import load_settings
from ...sources.source import Source
from .result import Survey


def read_training(source: Source, directory: str, headers: Sequence[Header] = ()) -> Survey:
    """Survey a sound checkpoint by its metadata; of the files, only the lengths are looked at.

    Args:
        source: where it is.
        directory: its path.
        headers: of safetensors files that hold parts of tensors, in place of the metadata.

    Raises:
        CheckpointError: the metadata is wrong, or a file is missing or too short.
    """
    with _open(source, directory, headers) as store:
        return _survey(store, _lengths(store))


def check_training(source: Source, directory: str, headers: Sequence[Header] = ()) -> Survey:
    """Survey a checkpoint, and compare each stored tensor with what the metadata says of it.

    Args:
        source: where it is.
        directory: its path.
        headers: of safetensors files that hold parts of tensors, in place of the metadata.

    Raises:
        CheckpointError: the metadata is wrong.
    """
    with _open(source, directory, headers) as store:
        problems = {str(error): error for error in _problems(store)}
        try:
            survey = _survey(store, _lengths(store))
        except CheckpointError:
            survey = Survey([])
        survey.problems += problems.values()
        return survey


def _open(source: Source, directory: str, headers: Sequence[Header]) -> TrainingStore:
    saved = metadata_of_parts(headers, directory) if headers else None
    settings = load_settings().settings.loader
    return TrainingStore(source, directory, settings, key_mapping={}, optimizer_state=True, saved=saved)


def _survey(store: TrainingStore, lengths: dict[str, int]) -> Survey:
    chunks: dict[str, list[TensorInfo]] = {path: [] for path in lengths}
    for tensor, chunk in _chunks(store):
        path, stored = os.path.join(store.files.directory, chunk.stored.relative_path), chunk.stored
        dtype = tensor.info(path, stored.offset).dtype
        chunks[path].append(TensorInfo(tensor.name, dtype, chunk.sizes, path, stored.offset, stored.length))
    headers = [Header(path, lengths[path], 0, tuple(infos), {}) for path, infos in chunks.items()]
    return Survey(headers, whole=list(store.by_name().values()), other_items=list(store.other_items()))


def _lengths(store: TrainingStore) -> dict[str, int]:
    """The lengths of the files, in order, by their paths."""
    lengths: dict[str, int] = {}
    for tensor, chunk in _chunks(store):
        _, file = store.files.item(chunk.stored, tensor.stored_name)
        lengths[file.path] = file.size
    return {path: lengths[path] for path in sorted(lengths, key=natural_key)}


def _problems(store: TrainingStore) -> Iterator[CheckpointError]:
    # Many at once: one by one, each read of a remote file would be waited for.
    with suppress(CheckpointError):
        store.chunks.locate(list(store.tensors.values()))
    for tensor, chunk in _chunks(store):
        try:
            (stored,) = store.chunks.items.locate([(tensor.stored_name, chunk.stored)])
        except CheckpointError as error:
            yield error
            continue
        # What is no plain bytes (compressed, several storages), only torch.load can judge.
        if stored is not None and (stored.shape != chunk.sizes or stored.dtype != tensor.dtype):
            yield misfit(tensor, chunk, stored.dtype, stored.shape, store.files.path_of(stored.file))


def _chunks(store: TrainingStore) -> Iterator[tuple[DcpTensor, DcpChunk]]:
    for tensor in store.tensors.values():
        for chunk in tensor.chunks:
            yield tensor, chunk
