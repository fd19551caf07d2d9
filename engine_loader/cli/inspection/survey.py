"""A checkpoint's files, headers and index, read without torch (but for a training's); damaged ones too."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ...errors import CheckpointError
from ...formats.dcp_parts import are_parts
from ...formats.dtypes import torch_shape
from ...formats.hf_index import ShardIndex
from ...formats.safetensors import Header, TensorInfo
from ...loading.find import TrainingCheckpoint, find_checkpoint, is_shard_name
from ...loading.shards import OpenFiles, listed_files, misplaced, open_files
from ...settings import load_settings
from ...sources.posix import PosixSource
from ...sources.registry import make_source, remote_backend
from ...sources.source import Source
from .result import Survey, is_listed

_THREADS = 16
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)(\.safetensors)")


def read(path: str) -> Survey:
    """Survey a sound checkpoint.

    Raises:
        CheckpointError: there is none, or a file is damaged: the first problem.
    """
    source = _source(path)
    found = find_checkpoint(source, path)
    if isinstance(found, TrainingCheckpoint):
        from .training import read_training  # imports torch

        return read_training(source, found.directory)
    with open_files(source, found) as files:
        if are_parts(files.headers):
            from .training import read_training

            return read_training(source, _directory(files.headers), files.headers)
        return Survey(files.headers, files.index)


def check(path: str) -> Survey:
    """Survey a checkpoint and look for everything that is wrong with it."""
    source = _source(path)
    try:
        found = find_checkpoint(source, path)
        if isinstance(found, TrainingCheckpoint):
            from .training import check_training  # imports torch

            return check_training(source, found.directory)
        paths, index = listed_files(source, found)
    except CheckpointError as error:
        return Survey([], problems=[error])
    survey = Survey([], index)
    with ThreadPoolExecutor(_THREADS) as threads:
        for header in threads.map(lambda file: _header(source, file), paths):
            if isinstance(header, Header):
                survey.headers.append(header)
            else:
                survey.problems.append(_with_count(header, index))
    try:
        if not survey.problems and are_parts(survey.headers):
            from .training import check_training

            return check_training(source, _directory(survey.headers), survey.headers)
    except CheckpointError as error:
        survey.problems.append(error)
        return survey
    if index is None:
        survey.problems += [*_missing_shards(paths), *_twice(survey.headers)]
    else:
        tensors = [info for header in survey.headers for info in header.tensors]
        readable = {header.file for header in survey.headers}
        nowhere = "no file has it: is a shard of another checkpoint here?"
        survey.problems += [error for _, error in misplaced(index, tensors, readable, nowhere=nowhere)]
        survey.notes += _unlisted(index, survey.headers, source.list(os.path.dirname(index.file)))
    survey.problems += _without_tensor_shape(survey.tensors)
    return survey


def _directory(headers: Sequence[Header]) -> str:
    """That of the files; they are in one, unless an index names folders."""
    directories = {os.path.dirname(header.file) for header in headers}
    return directories.pop() if len(directories) == 1 else ""


def _source(path: str) -> Source:
    backend = remote_backend(path)
    return PosixSource() if backend is None else make_source(backend, settings=load_settings().settings.loader)


def _header(source: Source, path: str) -> Header | CheckpointError:
    try:
        with OpenFiles(source, [path]) as files:
            return files.files[0].header
    except CheckpointError as error:
        return error


def _with_count(error: CheckpointError, index: ShardIndex | None) -> CheckpointError:
    """The error, with the number of tensors that the index expects in the file."""
    shards = [] if index is None else [index.path_of(shard) for shard in index.weight_map.values()]
    count = sum(path == error.file for path in shards)
    if not count:
        return error
    message = f"{error.message}; the index puts {count} tensor{'' if count == 1 else 's'} into it"
    return CheckpointError(message, file=error.file, offset=error.offset, hint=error.hint)


def _missing_shards(paths: Sequence[str]) -> Iterator[CheckpointError]:
    """Without an index, files that are numbered "-00001-of-00003" still say how many there must be."""
    series: dict[tuple[str, str, str, int], set[int]] = {}
    for path in paths:
        found = _NUMBERED.fullmatch(path)
        if found:
            start, number, count, end = found.groups()
            series.setdefault((start, count, end, len(number)), set()).add(int(number))
    for (start, count, end, width), numbers in series.items():
        for missing in sorted(set(range(1, int(count) + 1)) - numbers):
            file = f"{start}{missing:0{width}}-of-{count}{end}"
            yield CheckpointError("this shard is not there", file=file, hint="the download is not complete: fetch it")


def _twice(headers: list[Header]) -> Iterator[CheckpointError]:
    first: dict[str, str] = {}
    for header in headers:
        for info in header.tensors:
            if info.name in first:
                hint = "without an index it is not clear which one counts: keep the files that belong together"
                yield CheckpointError(f"{info.name!r} is also in {first[info.name]}", file=info.file, hint=hint)
            first.setdefault(info.name, info.file)


def _without_tensor_shape(infos: list[TensorInfo]) -> Iterator[CheckpointError]:
    for info in infos:
        try:
            torch_shape(info.dtype, info.shape)
        except CheckpointError as error:
            yield CheckpointError(f"{info.name!r}: {error.message}", file=info.file, offset=info.offset)


def _unlisted(index: ShardIndex, headers: list[Header], names: list[str]) -> Iterator[str]:
    unlisted = Counter(info.file for header in headers for info in header.tensors if not is_listed(index, info))
    for file, count in unlisted.items():
        yield f"{file}: {count} tensor{' is' if count == 1 else 's are'} not in the index and will not be loaded"
    for name in names:
        if is_shard_name(name) and name not in index.weight_map.values():
            yield f"{index.path_of(name)}: the index does not use this file"
