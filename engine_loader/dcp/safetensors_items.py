"""The header and the tensors of a safetensors file of a DCP checkpoint, which is written as a stream."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.planner import WriteItem

from ..errors import CheckpointError
from ..formats.dtypes import header_shape
from ..formats.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES
from ..loading.training.items import dtype_name

_PADDING = 8
_HF_DCP_VERSION = "1.0"


def write_header(stream: io.BufferedIOBase, items: Sequence[WriteItem]) -> list[tuple[WriteItem, int, int]]:
    """Write the header of a file that holds these tensors. Their names must differ.

    Returns:
        (item, offset in the file, bytes) of each tensor, in the order in which the tensors must be written.

    Raises:
        CheckpointError: safetensors has no name for an element type, or the header is longer than the format allows.
    """
    begin = stream.tell()
    # Wide elements first, so that the offset of each tensor is a multiple of its element's size.
    ordered = sorted(items, key=lambda item: -_dtype(item).itemsize)
    entries: dict[str, Any] = {}
    locations: list[tuple[WriteItem, int, int]] = []
    sharding: dict[str, dict[str, list[int]]] = {}
    end = 0
    for item in ordered:
        data = item.tensor_data
        assert data is not None
        name, dtype = dtype_name(data.properties.dtype), data.properties.dtype
        if name is None:
            raise CheckpointError(
                f"{item.index.fqn!r} is {dtype}, which safetensors cannot hold",
                hint="save with serialization_format=TORCH_SAVE",
            )
        nbytes = data.chunk.sizes.numel() * dtype.itemsize
        shape = list(header_shape(name, tuple(data.chunk.sizes)))
        entries[item.index.fqn] = {"dtype": name, "shape": shape, "data_offsets": [end, end + nbytes]}
        sharding[item.index.fqn] = {"saved_offsets": list(data.chunk.offsets)}
        locations.append((item, end, nbytes))
        end += nbytes
    metadata = {"DCP_SHARDING_INFO": json.dumps(sharding), "DCP_VERSION": _HF_DCP_VERSION, "format": "pt"}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _PADDING)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError("too many tensors for one safetensors file", hint="use more threads or files")
    stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    first = begin + LENGTH_BYTES + len(text)
    return [(item, first + offset, nbytes) for item, offset, nbytes in locations]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor's elements, in order; a contiguous tensor is not copied."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype
