"""A checkpoint's files, headers and index, read without torch (but for a training's); damaged ones too."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ...errors import CheckpointError
from ...formats.dtypes import torch_shape
from ...formats.hf_index import ShardIndex
from ...formats.safetensors import Header, TensorInfo
from ...loading.find import OpenFiles, is_dcp, locate, open_files
from ...settings import load_settings
from ...sources.posix import PosixSource
from ...sources.registry import make_source, remote_backend
from ...sources.source import Source

_THREADS = 16
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)(\.safetensors)")


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
        return infos if self.index is None else [info for info in infos if _listed(self.index, info)]


def read(path: str) -> Survey:
    """Survey a sound checkpoint.

    Raises:
        CheckpointError: there is none, or a file is damaged: the first problem.
    """
    source = _source(path)
    if is_dcp(source, path):
        from .training import read_training  # imports torch

        return read_training(source, path)
    with open_files(source, path) as files:
        return Survey([opened.header for opened in files.files], files.index)


def check(path: str) -> Survey:
    """Survey a checkpoint and look for everything that is wrong with it."""
    source = _source(path)
    if is_dcp(source, path):
        from .training import check_training

        return check_training(source, path)
    try:
        paths, index = locate(source, path)
    except CheckpointError as error:
        return Survey([], problems=[error])
    survey = Survey([], index)
    with ThreadPoolExecutor(_THREADS) as threads:
        for found in threads.map(lambda file: _header(source, file), paths):
            if isinstance(found, Header):
                survey.headers.append(found)
            else:
                survey.problems.append(_with_count(found, index))
    if index is None:
        survey.problems += [*_missing_shards(paths), *_twice(survey.headers)]
    else:
        survey.problems += _not_in_their_files(index, survey.headers)
        survey.notes += _unlisted(index, survey.headers, source.list(os.path.dirname(index.file)))
    survey.problems += _without_tensor_shape(survey.tensors)
    return survey


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
    count = 0 if index is None or error.file is None else list(_shard_paths(index)).count(error.file)
    if not count:
        return error
    message = f"{error.message}; the index puts {count} tensor{'' if count == 1 else 's'} into it"
    return CheckpointError(message, file=error.file, offset=error.offset, hint=error.hint)


def _not_in_their_files(index: ShardIndex, headers: list[Header]) -> Iterator[CheckpointError]:
    places: dict[str, str] = {}
    names: dict[str, set[str]] = {}
    for header in headers:
        names[header.file] = {info.name for info in header.tensors}
        places |= dict.fromkeys(names[header.file], header.file)
    for (name, shard), path in zip(index.weight_map.items(), _shard_paths(index), strict=True):
        if path in names and name not in names[path]:
            hint = (
                f"it is in {places[name]}"
                if name in places
                else "no file has it: is a shard of another checkpoint here?"
            )
            yield CheckpointError(
                f"the index puts {name!r} into {shard!r}, which does not have it", file=index.file, hint=hint
            )


def _missing_shards(paths: list[str]) -> Iterator[CheckpointError]:
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
    unlisted = Counter(info.file for header in headers for info in header.tensors if not _listed(index, info))
    for file, count in unlisted.items():
        yield f"{file}: {count} tensor{' is' if count == 1 else 's are'} not in the index and will not be loaded"
    for name in names:
        if name.endswith(".safetensors") and name not in index.weight_map.values():
            yield f"{index.path_of(name)}: the index does not use this file"


def _listed(index: ShardIndex, info: TensorInfo) -> bool:
    shard = index.weight_map.get(info.name)
    return shard is not None and index.path_of(shard) == info.file


def _shard_paths(index: ShardIndex) -> Iterator[str]:
    return map(index.path_of, index.weight_map.values())
