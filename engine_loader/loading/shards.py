"""Open safetensors files, their headers read and checked, and the index that lists their tensors."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

from ..errors import CheckpointError
from ..failures import RETRYABLE, end_of_file, io_error
from ..formats.dcp_parts import is_part_name
from ..formats.hf_index import INDEX_NAME, MAX_INDEX_BYTES, ShardIndex, parse_index
from ..formats.safetensors import LENGTH_BYTES, Header, TensorInfo, header_length, parse_header
from ..garbage import no_garbage_collection
from ..sources.source import Source, SourceFile
from .find import SafetensorsFiles, ShardedState, natural_key

logger = logging.getLogger(__name__)

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
        lacking: name -> error of the tensors that the index lists and no file has; known after ``by_name``.
    """

    def __init__(self, source: Source, paths: Sequence[str], index: ShardIndex | None = None) -> None:
        """Open ``paths`` and read their headers, several at a time.

        Raises:
            CheckpointError: a file is missing or unreadable, or its header is wrong.
        """
        self.index = index
        self.lacking: dict[str, CheckpointError] = {}
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

    @property
    def headers(self) -> list[Header]:
        """The header of every file, in file order."""
        return [opened.header for opened in self.files]

    def by_name(self) -> dict[str, TensorInfo]:
        """The tensors by name, in file order; of two with one name, the one whose file the index names.

        What the index lists and no file has is left out, with a warning.

        Raises:
            CheckpointError: two have one name, or the index puts a tensor into one file and another has it.
        """
        tensors = self.tensors
        listed: dict[str, str] = {}
        if self.index is not None:
            present = {info.name for info in tensors}
            errors = dict(misplaced(self.index, tensors))
            for name, error in errors.items():
                if name in present:
                    raise error
            self.lacking = errors
            _warn_of(errors)
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

    def leave_out(self, tensors: Collection[tuple[str, str]]) -> None:
        """From now on, be without these tensors, each a pair of its file's path and its name."""
        for number, opened in enumerate(self.files):
            kept = tuple(info for info in opened.header.tensors if (info.file, info.name) not in tensors)
            if len(kept) < len(opened.header.tensors):
                self.files[number] = replace(opened, header=replace(opened.header, tensors=kept))

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
        warn_of_other_parts(index, found.names)
        present = set(found.names)
        for shard in index.shards:
            if "/" not in shard and shard not in present:
                count = sum(name == shard for name in index.weight_map.values())
                raise CheckpointError(
                    f"the index puts {count} tensor{'' if count == 1 else 's'} into {shard!r}, which is not there",
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


def follow_indexes(source: Source, files: OpenFiles) -> None:
    """Leave out the tensors of ``files`` that an index in their directory says are in another one of them.

    Such a tensor is a copy that an earlier save left behind. An engine may rightly leave out shards that an index
    lists; and an index may list tensors that its shard does not have (some public models do), which is a warning.

    Raises:
        CheckpointError: an index is unreadable or wrong.
    """
    paths = {opened.file.path for opened in files.files}
    for directory in {os.path.dirname(path) for path in paths}:
        names = source.list(directory or ".")
        if INDEX_NAME not in names:
            continue
        index = read_index(source, os.path.join(directory, INDEX_NAME))
        warn_of_other_parts(index, names)
        tensors = files.tensors
        _warn_of(dict(misplaced(index, tensors, paths)))
        stale = _superseded(index, tensors, directory)
        if stale:
            logger.warning(
                "%s: %d tensors are also in files that the index does not name for them, and are not read from there, "
                "such as %r in %s",
                *(index.file, len(stale), stale[0].name, stale[0].file),
            )
            files.leave_out({(info.file, info.name) for info in stale})


def warn_of_other_parts(index: ShardIndex, names: Collection[str]) -> None:
    """Log that files with parts of tensors lie beside an index that does not name them.

    They are of another save, and nothing in them tells which one is newer: whole tensors that were put together from
    them, or weights from which a training began.

    Args:
        index: that of the directory, which counts.
        names: of all files there.
    """
    listed = set(index.weight_map.values())
    others = sorted(name for name in names if is_part_name(name) and name not in listed)
    if others:
        logger.warning(
            "%s does not name %d files beside it that hold parts of tensors, such as %s: they are not read; if they "
            "are what is wanted, put them into a directory of their own",
            *(index.file, len(others), others[0]),
        )


def _superseded(index: ShardIndex, tensors: Sequence[TensorInfo], directory: str) -> list[TensorInfo]:
    """The tensors in files of ``directory`` that stand in the file, too, that the index names for them."""
    here = {(info.file, info.name) for info in tensors}
    found = []
    for info in tensors:
        shard = index.weight_map.get(info.name)
        if shard is None or os.path.dirname(info.file) != directory:
            continue
        right = index.path_of(shard)
        if right != info.file and (right, info.name) in here:
            found.append(info)
    return found


def misplaced(
    index: ShardIndex,
    tensors: Sequence[TensorInfo],
    files: Collection[str] | None = None,
    *,
    nowhere: str = "index and shards are of different checkpoints, or a shard is damaged",
) -> Iterator[tuple[str, CheckpointError]]:
    """Name and error of every tensor that the index puts into a file that does not have it.

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
        error = CheckpointError(
            f"the index puts {name!r} into {shard!r}, which does not have it",
            file=index.file,
            hint=f"it is in {files_of[name]}" if name in files_of else nowhere,
        )
        yield name, error


def _warn_of(errors: Mapping[str, CheckpointError]) -> None:
    """Log what ``misplaced`` found."""
    if errors:
        logger.warning(
            "the index lists %d tensors that their shards do not have, the first: %s; `engine-loader inspect --check` "
            "lists all",
            *(len(errors), next(iter(errors.values()))),
        )


def read_small_file(source: Source, path: str) -> bytes:
    """The content of a file that is no weights.

    Raises:
        CheckpointError: it is missing, unreadable, or too large to be one.
    """
    file = source.open(path)
    try:
        if file.size > MAX_INDEX_BYTES:
            raise CheckpointError(f"the file has {file.size} bytes, too many for a file that is not weights", file=path)
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
        except CheckpointError:  # told already; it may be an OSError, too
            raise
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
