"""Open safetensors files, their headers read and checked, and the index that lists their tensors."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from ..errors import CheckpointError
from ..failures import RETRYABLE, end_of_file, io_error
from ..formats.hf_index import INDEX_NAME, MAX_INDEX_BYTES, ShardIndex, parse_index
from ..formats.safetensors import LENGTH_BYTES, Header, TensorInfo, header_length, parse_header
from ..garbage import no_garbage_collection
from ..sources.source import Source, SourceFile
from .find import SafetensorsFiles, ShardedState, natural_key

_HEADER_THREADS = 16
# Starting a thread for it takes a part of a millisecond, too.
_SLOW_S = 0.001
# One read gets the length and, mostly, the whole header.
_FIRST_READ_BYTES = 128 << 10
_TRIES = 5
_RETRY_DELAY_S = 0.05


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A safetensors file that is open, with its checked header."""

    file: SourceFile
    header: Header


class OpenFiles:
    """The open files of a checkpoint, in order; closes them together.

    Attributes:
        files: the files.
        index: the checkpoint's index, where it has one.
    """

    def __init__(self, source: Source, paths: Sequence[str], index: ShardIndex | None = None) -> None:
        """Open ``paths`` and read their headers, several at a time.

        Raises:
            CheckpointError: a file is missing or unreadable, or its header is wrong.
        """
        self.index = index
        with ExitStack() as stack, no_garbage_collection():
            self.files: list[OpenShard] = []
            for opened in _open_all(source, paths):
                stack.callback(opened.file.close)
                self.files.append(opened)
            self._close = stack.pop_all()

    @property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor of every file, in file order."""
        return [info for opened in self.files for info in opened.header.tensors]

    def by_name(self) -> dict[str, TensorInfo]:
        """The tensors by name, in file order; of two with one name, the one whose file the index names.

        Raises:
            CheckpointError: two have one name, or the index lists a tensor that its file does not have.
        """
        tensors = self.tensors
        listed: dict[str, str] = {}
        if self.index is not None:
            for error in misplaced(self.index, tensors):
                raise error
            listed = {name: self.index.path_of(shard) for name, shard in self.index.weight_map.items()}
        infos: dict[str, TensorInfo] = {}
        for info in tensors:
            if listed and listed.get(info.name, info.file) != info.file:
                continue
            if info.name in infos:
                raise CheckpointError(
                    f"{info.name!r} is also in {infos[info.name].file}",
                    file=info.file,
                    hint="it is not clear which one counts: give the list of files that belong together",
                )
            infos[info.name] = info
        return infos

    def verify_unchanged(self) -> None:
        """Raise CheckpointError when a file is not what it was when it was opened."""
        for opened in self.files:
            opened.file.verify_unchanged()

    def close(self) -> None:
        """Close every file. Safe to call twice."""
        self._close.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_files(source: Source, found: SafetensorsFiles | ShardedState) -> OpenFiles:
    """Open a checkpoint's files.

    Raises:
        CheckpointError: as ``listed_files`` and ``OpenFiles``, or a shard that the index names is missing.
    """
    paths, index = listed_files(source, found)
    if index is not None and isinstance(found, SafetensorsFiles):
        present = set(found.names)
        for shard in index.shards:
            if "/" not in shard and shard not in present:
                count = sum(name == shard for name in index.weight_map.values())
                raise CheckpointError(
                    f"the index puts {count} tensors into {shard!r}, which is not there",
                    file=index.file,
                    hint="the download is not complete: fetch the missing shard",
                )
    return OpenFiles(source, paths, index)


def listed_files(source: Source, found: SafetensorsFiles | ShardedState) -> tuple[Sequence[str], ShardIndex | None]:
    """The paths of a checkpoint's files in natural order, those of the index where there is one, and the index.

    Of a sharded_state checkpoint, the files of all ranks.

    Raises:
        CheckpointError: the index is unreadable or wrong.
    """
    if isinstance(found, ShardedState):
        found = found.files
    if found.index_file is None:
        return found.paths, None
    index = read_index(source, found.index_file)
    return [index.path_of(shard) for shard in sorted(index.shards, key=natural_key)], index


def read_index(source: Source, path: str) -> ShardIndex:
    """Read and check an index.

    Raises:
        CheckpointError: it is missing, unreadable or wrong.
    """
    return parse_index(read_small_file(source, path), path)


def check_indexes(source: Source, files: OpenFiles) -> None:
    """Check files against the indexes of their directories.

    An engine may rightly leave out shards that an index lists; but what it does read must hold what the index says.

    Raises:
        CheckpointError: a shard does not have a tensor that the index puts into it.
    """
    tensors, paths = files.tensors, {opened.file.path for opened in files.files}
    for directory in {os.path.dirname(path) for path in paths}:
        if INDEX_NAME in source.list(directory or "."):
            for error in misplaced(read_index(source, os.path.join(directory, INDEX_NAME)), tensors, paths):
                raise error


def misplaced(
    index: ShardIndex,
    tensors: Sequence[TensorInfo],
    files: Collection[str] | None = None,
    *,
    nowhere: str = "index and shards are of different checkpoints, or a shard is damaged",
) -> Iterator[CheckpointError]:
    """An error for every tensor that the index puts into a file that does not have it.

    Args:
        index: says which file has which tensor.
        tensors: those of the files that were read.
        files: only what the index puts into these is looked at; None: all.
        nowhere: the hint where none of the files has it.
    """
    here = {(info.file, info.name) for info in tensors}
    files_of = {info.name: info.file for info in tensors}
    for name, shard in index.weight_map.items():
        path = index.path_of(shard)
        if (path, name) in here or (files is not None and path not in files):
            continue
        yield CheckpointError(
            f"the index puts {name!r} into {shard!r}, which does not have it",
            file=index.file,
            hint=f"it is in {files_of[name]}" if name in files_of else nowhere,
        )


def read_small_file(source: Source, path: str) -> bytes:
    """The content of a file that is no weights.

    Raises:
        CheckpointError: it is missing, unreadable, or too large to be one.
    """
    file = source.open(path)
    try:
        if file.size > MAX_INDEX_BYTES:
            raise CheckpointError(f"the file has {file.size} bytes, too many for what is no weights", file=path)
        return _read(file, 0, file.size)
    finally:
        file.close()


def _open_all(source: Source, paths: Sequence[str]) -> Iterator[OpenShard]:
    """Open files: one after the other as long as each takes no time, else several at once.

    On threads in any case: Ctrl-C does not get between an open and its close there.
    """
    ahead = deque(paths)
    with ThreadPoolExecutor(min(_HEADER_THREADS, max(1, len(ahead)))) as threads:
        yield from threads.submit(_open_while_quick, source, ahead).result()
        futures = [threads.submit(_open_file, source, path) for path in ahead]
        failure: CheckpointError | None = None
        for future in futures:
            try:
                yield future.result()
            except CheckpointError as error:
                failure = failure or error
        if failure is not None:
            raise failure


def _open_while_quick(source: Source, ahead: deque[str]) -> list[OpenShard]:
    """Open the first ``ahead``, which are taken from it."""
    with ExitStack() as stack:
        files = []
        slow = False
        while ahead and not slow:
            begin = time.perf_counter()
            files.append(_open_file(source, ahead.popleft()))
            stack.callback(files[-1].file.close)
            slow = time.perf_counter() - begin > _SLOW_S
        stack.pop_all()
        return files


def _open_file(source: Source, path: str) -> OpenShard:
    file = source.open(path)
    try:
        return OpenShard(file, _read_header(file))
    except BaseException:
        file.close()
        raise


def _read_header(file: SourceFile) -> Header:
    first = _read(file, 0, min(file.size, _FIRST_READ_BYTES))
    end = LENGTH_BYTES + header_length(first, file.size, file.path)
    if end > len(first):
        first += _read(file, len(first), end - len(first))
    return parse_header(first[LENGTH_BYTES:end], file.size, file.path)


def _read(file: SourceFile, offset: int, nbytes: int) -> bytes:
    """Read a few bytes on this thread, short reads resumed and passing errors tried again."""
    buffer = memoryview(bytearray(nbytes))
    done = tries = 0
    while done < nbytes:
        try:
            got = file.read_into(offset + done, [buffer[done:]])
        except OSError as error:
            tries += 1
            if error.errno not in RETRYABLE or tries >= _TRIES:
                raise io_error(file.path, offset + done, error.errno, tries=tries) from error
            time.sleep(_RETRY_DELAY_S * 2 ** (tries - 1))
            continue
        if got == 0:
            raise end_of_file(file.path, offset + done, file.size)
        done += got
    return bytes(buffer)
