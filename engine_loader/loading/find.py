"""From a path to the files of a checkpoint, their headers read and checked."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from ..errors import CheckpointError
from ..failures import RETRYABLE, end_of_file, io_error
from ..formats.dcp_metadata import METADATA_NAME
from ..formats.hf_index import INDEX_NAME, MAX_INDEX_BYTES, ShardIndex, parse_index
from ..formats.safetensors import LENGTH_BYTES, Header, TensorInfo, header_length, parse_header
from ..formats.sharded_state import ShardRank, shards_by_rank, shards_of
from ..garbage import no_garbage_collection
from ..sources.source import Source, SourceFile

PathLike = str | os.PathLike[str]
_HEADER_THREADS = 16
# Starting a thread for it takes a part of a millisecond, too.
_SLOW_S = 0.001
# One read gets the length and, mostly, the whole header.
_FIRST_READ_BYTES = 128 << 10
_TRIES = 5
_RETRY_DELAY_S = 0.05


def is_dcp(source: Source, directory: str) -> bool:
    """Whether a directory holds a DCP checkpoint, and no safetensors checkpoint beside it."""
    if not source.is_dir(directory):
        return False
    names = source.list(directory)
    return (
        METADATA_NAME in names and INDEX_NAME not in names and not any(name.endswith(".safetensors") for name in names)
    )


@dataclass(frozen=True, slots=True)
class OpenFile:
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
            self.files: list[OpenFile] = []
            for opened in _open_all(source, paths):
                stack.callback(opened.file.close)
                self.files.append(opened)
            self._close = stack.pop_all()

    @property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor of every file, in file order."""
        return [info for opened in self.files for info in opened.header.tensors]

    @property
    def file_bytes(self) -> int:
        """The size of all files together."""
        return sum(opened.header.file_bytes for opened in self.files)

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


def locate(source: Source, path: PathLike | Sequence[PathLike]) -> tuple[list[str], ShardIndex | None]:
    """The safetensors files that ``path`` stands for, in natural order, and the index where there is one.

    Args:
        source: where to look.
        path: a file, a directory (or an object store's prefix) with or without model.safetensors.index.json, or a list
            of files.

    Raises:
        CheckpointError: there is nothing to load; the message says what was found instead.
    """
    if not isinstance(path, str | os.PathLike):
        paths = [os.fspath(item) for item in path]
        if not paths:
            raise CheckpointError("the list of files is empty")
        return paths, None
    text = os.fspath(path)
    if not source.is_dir(text):
        return [text], None
    text = without_end(text)
    names = source.list(text)
    if INDEX_NAME in names:
        index = read_index(source, text)
        return [index.path_of(shard) for shard in sorted(index.shards, key=natural_key)], index
    weights = sorted((name for name in names if name.endswith(".safetensors")), key=natural_key)
    if not weights:
        raise CheckpointError("no .safetensors file in this directory", file=text, hint=_what_is_there(names))
    return [os.path.join(text, name) for name in weights], None


def sharded_files(source: Source, path: str, rank: ShardRank | None, pattern: str | None) -> list[str]:
    """One rank's files of a sharded_state checkpoint; empty where ``path`` is none.

    Args:
        source: where to look.
        path: a directory.
        rank: whose files; None where there is only one.
        pattern: of their names; None: vLLM's.

    Raises:
        CheckpointError: there are several ranks, or not this one.
    """
    if not source.is_dir(path):
        return []
    path = without_end(path)
    names = source.list(path)
    shards = {} if INDEX_NAME in names and pattern is None else shards_by_rank(names, pattern)
    if not shards:
        if rank is not None:
            raise CheckpointError(
                "this is no sharded_state checkpoint, so there are no ranks to choose from", file=path
            )
        return []
    if rank is None and len(shards) > 1:
        raise CheckpointError(
            f"this is a sharded_state checkpoint of {len(shards)} ranks",
            file=path,
            hint="say which: open_checkpoint(…, rank=0)",
        )
    return [os.path.join(path, name) for name in shards_of(shards, rank or next(iter(shards)), None, path)]


def read_index(source: Source, directory: str) -> ShardIndex:
    """Read and check the index in ``directory``.

    Raises:
        CheckpointError: it is missing, unreadable or wrong.
    """
    path = os.path.join(directory, INDEX_NAME)
    return parse_index(read_small_file(source, path), path)


def open_files(source: Source, path: PathLike | Sequence[PathLike]) -> OpenFiles:
    """Locate and open a checkpoint.

    Raises:
        CheckpointError: as ``locate`` and ``OpenFiles``, or a shard that the index names is missing.
    """
    paths, index = locate(source, path)
    if index is not None:
        present = set(source.list(os.path.dirname(index.file)))
        for shard in index.shards:
            if "/" not in shard and shard not in present:
                count = sum(name == shard for name in index.weight_map.values())
                raise CheckpointError(
                    f"the index puts {count} tensors into {shard!r}, which is not there",
                    file=index.file,
                    hint="the download is not complete: fetch the missing shard",
                )
    return OpenFiles(source, paths, index)


def without_end(directory: str) -> str:
    """A URL without slashes at its end: the keys below it would begin with empty parts. Other paths as they are."""
    return directory.rstrip("/") if "://" in directory else directory


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts "shard-10" after "shard-9"."""
    parts = re.split(r"(\d+)", name)
    return [
        (0, len(digits := part.lstrip("0")), digits) if number % 2 else (1, 0, part)
        for number, part in enumerate(parts)
    ]


def _open_all(source: Source, paths: Sequence[str]) -> Iterator[OpenFile]:
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


def _open_while_quick(source: Source, ahead: deque[str]) -> list[OpenFile]:
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


def _open_file(source: Source, path: str) -> OpenFile:
    file = source.open(path)
    try:
        return OpenFile(file, _read_header(file))
    except BaseException:
        file.close()
        raise


def _read_header(file: SourceFile) -> Header:
    first = _read(file, 0, min(file.size, _FIRST_READ_BYTES))
    end = LENGTH_BYTES + header_length(first, file.size, file.path)
    if end > len(first):
        first += _read(file, len(first), end - len(first))
    return parse_header(first[LENGTH_BYTES:end], file.size, file.path)


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


def _what_is_there(names: list[str]) -> str:
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "it has PyTorch files; this loader reads safetensors only: convert them with safetensors or transformers"
    if not names:
        return "it is empty"
    return f"it has {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
