"""Puts the parts that ranks saved together: files with whole tensors, and their index."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, cast

from ...errors import CheckpointError
from ...formats.dtypes import DTYPE_BITS
from ...formats.hf_index import INDEX_NAME
from ...formats.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo
from ...loading.shards import OpenFiles
from ...loading.training.parts import common_directory, metadata_of_parts
from ...loading.training.store import TrainingStore
from ...report.load_report import LoadReport
from ...settings import load_settings
from ...sources.source import Source
from ..safetensors_items import tensor_bytes

Destination: TypeAlias = Callable[[str, int], AbstractContextManager[io.IOBase]]
"""Opens a file by its name and its length for writing."""
_READ_AHEAD_BYTES = 128 << 20
_PADDING = 8


def consolidate(
    source: Source, parts: Sequence[str], create: Destination, files_of: Mapping[str, str], *, threads: int
) -> None:
    """Write whole tensors from their parts, and the index when all of them are written.

    In memory are, for each thread, 128 MiB of what is read ahead, and a tensor.

    Args:
        source: where the parts are.
        parts: the paths of their files.
        create: opens each file.
        files_of: name -> name of the file that a tensor goes to.
        threads: how many files are written at a time.

    Raises:
        CheckpointError: parts cannot be read or do not fit together, or ``files_of`` names a tensor that is not there.
        OSError: a file cannot be written.
    """
    with OpenFiles(source, parts) as opened:
        headers = opened.headers
    directory = common_directory(parts)
    settings = load_settings({"buffer_bytes": _READ_AHEAD_BYTES}).settings.loader
    saved = metadata_of_parts(headers, directory)
    store = TrainingStore(source, directory, settings, key_mapping={}, optimizer_state=True, saved=saved)
    with store:
        infos = store.by_name()
        contents: dict[str, list[TensorInfo]] = {}
        for name, file in files_of.items():
            if name not in infos:
                raise CheckpointError(f"no part of {name!r} was saved", file=directory)
            contents.setdefault(file, []).append(infos[name])
        with ThreadPoolExecutor(min(threads, max(1, len(contents)))) as pool:
            list(pool.map(lambda file: _write(store, file, contents[file], create), contents))
    index: dict[str, Any] = {"metadata": {"total_size": sum(infos[name].nbytes for name in files_of)}}
    index["weight_map"] = dict(files_of)
    text = json.dumps(index, indent=2).encode()
    with create(INDEX_NAME, len(text)) as stream:
        cast(io.BufferedIOBase, stream).write(text)


def _write(store: TrainingStore, file: str, tensors: Sequence[TensorInfo], create: Destination) -> None:
    # Wide elements first, so that the offset of each tensor is a multiple of its element's size.
    ordered = sorted(tensors, key=lambda info: -DTYPE_BITS[info.dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in ordered:
        entries[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _PADDING)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError("too many tensors for one safetensors file", hint="give more files: fqn_to_index_mapping")
    with create(file, LENGTH_BYTES + len(text) + end) as opened:
        stream = cast(io.BufferedIOBase, opened)
        stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for _, tensor in store.stream(ordered, LoadReport()):
            stream.write(tensor_bytes(tensor))
