"""A training's checkpoint (torch.distributed.checkpoint): what its metadata says, and whether its files fit that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import torch

from ...errors import CheckpointError
from ...formats.safetensors import Header, TensorInfo
from ...loading.find import natural_key
from ...loading.training.checkpoint import DcpCheckpoint, DcpChunk, DcpTensor
from ...settings import load_settings
from ...sources.source import Source
from .survey import Survey


def read_training(source: Source, directory: str) -> Survey:
    """Survey a sound checkpoint by its metadata; of the files, only the lengths are looked at.

    Raises:
        CheckpointError: the metadata is wrong, or a file is missing or too short.
    """
    with _open(source, directory) as checkpoint:
        return _survey(checkpoint, _lengths(checkpoint))


def check_training(source: Source, directory: str) -> Survey:
    """Survey a checkpoint, and compare each stored tensor with what the metadata says of it."""
    try:
        checkpoint = _open(source, directory)
    except CheckpointError as error:
        return Survey([], problems=[error])
    with checkpoint:
        problems = {str(error): error for error in _problems(checkpoint)}
        try:
            survey = _survey(checkpoint, _lengths(checkpoint))
        except CheckpointError:
            survey = Survey([])
        survey.problems += problems.values()
        return survey


def _open(source: Source, directory: str) -> DcpCheckpoint:
    settings = load_settings().settings.loader
    return DcpCheckpoint(source, directory, settings, torch.device("cpu"), key_mapping={}, optimizer_state=True)


def _survey(checkpoint: DcpCheckpoint, lengths: dict[str, int]) -> Survey:
    parts: dict[str, list[TensorInfo]] = {path: [] for path in lengths}
    whole = []
    for tensor in checkpoint.stored_tensors:
        places = [os.path.join(checkpoint.files.directory, chunk.place.relative_path) for chunk in tensor.chunks]
        for chunk, path in zip(tensor.chunks, places, strict=True):
            info = tensor.info(path, chunk.place.offset)
            parts[path].append(TensorInfo(info.name, info.dtype, chunk.sizes, path, info.offset, chunk.place.length))
        first = (places[0], tensor.chunks[0].place.offset) if places else (checkpoint.files.metadata_path, 0)
        whole.append(tensor.info(*first))
    headers = [Header(path, lengths[path], 0, tuple(infos), {}) for path, infos in parts.items()]
    return Survey(headers, whole=whole, other_items=list(checkpoint.other_items()))


def _lengths(checkpoint: DcpCheckpoint) -> dict[str, int]:
    """The lengths of the files, in order, by their paths."""
    lengths: dict[str, int] = {}
    for tensor, chunk in _chunks(checkpoint):
        _, file = checkpoint.files.item(chunk.place, tensor.stored_name)
        lengths[file.path] = file.size
    return {path: lengths[path] for path in sorted(lengths, key=natural_key)}


def _problems(checkpoint: DcpCheckpoint) -> Iterator[CheckpointError]:
    # Many at once: one by one, each read of a remote file would be waited for.
    with suppress(CheckpointError):
        checkpoint.located()
    for tensor, chunk in _chunks(checkpoint):
        try:
            (stored,) = checkpoint.files.locate([(tensor.stored_name, chunk.place)])
        except CheckpointError as error:
            yield error
            continue
        # What is no plain bytes (compressed, several storages), only torch.load can judge.
        if stored is not None and (stored.shape != chunk.sizes or stored.dtype != tensor.dtype):
            yield CheckpointError(
                f"{tensor.stored_name!r} is {stored.dtype} {list(stored.shape)} in the file, "
                f"but {tensor.dtype} {list(chunk.sizes)} by the metadata",
                file=checkpoint.files.path_of(stored.file),
                offset=chunk.place.offset,
                hint="metadata and files are of different saves: copy the checkpoint again",
            )


def _chunks(checkpoint: DcpCheckpoint) -> Iterator[tuple[DcpTensor, DcpChunk]]:
    for tensor in checkpoint.stored_tensors:
        for chunk in tensor.chunks:
            yield tensor, chunk
