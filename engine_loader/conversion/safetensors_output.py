"""Writes a Hugging Face checkpoint: safetensors files of a bounded size, and their index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..dcp.safetensors_items import tensor_bytes
from ..errors import CheckpointError
from ..formats.dtypes import DTYPE_BITS
from ..formats.hf_index import INDEX_NAME
from ..formats.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES
from .written_tensors import Outgoing, Tensors, in_writing_order, read_in_order

_PADDING = 8


def write_safetensors(
    directory: Path,
    checkpoint: Tensors,
    tensors: Sequence[Outgoing],
    *,
    max_shard_bytes: int,
    written: Callable[[int], object],
) -> None:
    """Write tensors, each once, as it is read.

    Args:
        directory: empty.
        checkpoint: the source.
        tensors: what to write.
        max_shard_bytes: a file has no more bytes of tensors, unless a single one has.
        written: called with the bytes of each tensor that was written.

    Raises:
        CheckpointError: the tensors cannot be read, or safetensors cannot hold them.
        OSError: they cannot be written.
    """
    shards = [in_writing_order(shard) for shard in _shards(tensors, max_shard_bytes)]
    headers = [_header(shard) for shard in shards]
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    for name, shard, header in zip(names, shards, headers, strict=True):
        with open(directory / name, "wb", buffering=0) as file:
            _write_all(file.fileno(), header)
            for going, tensor in read_in_order(checkpoint, shard):
                _write_all(file.fileno(), tensor_bytes(tensor))
                written(going.nbytes)
            os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
        (directory / INDEX_NAME).write_text(index)


def _shards(tensors: Sequence[Outgoing], max_shard_bytes: int) -> Iterator[list[Outgoing]]:
    shard: list[Outgoing] = []
    nbytes = 0
    for tensor in tensors:
        if shard and nbytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, nbytes = [], 0
        shard.append(tensor)
        nbytes += tensor.nbytes
    yield shard


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _header(shard: Sequence[Outgoing]) -> bytes:
    """The length of the header and the header."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        if tensor.dtype not in DTYPE_BITS:
            raise CheckpointError(
                f"{tensor.info.name!r} is {tensor.dtype}, which safetensors cannot hold",
                file=tensor.info.file,
                hint="leave it out by key_mapping, or convert to dcp",
            )
        span = [end, end + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.info.shape), "data_offsets": span}
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _PADDING)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError("too many tensors for one safetensors file", hint="lower the size of a shard")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _write_all(descriptor: int, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
