"""Makes safetensors files byte by byte, right ones and wrong ones."""

import ctypes
import json
import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine_loader.formats.dtypes import DTYPE_BITS

Entry = tuple[str, Sequence[int], bytes]
"""Element type, shape and content of a tensor."""


def encode(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header (text or bytes as they are, else as JSON), and ``length`` instead of its true length."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def checkpoint(tensors: Mapping[str, Entry], metadata: Mapping[str, str] | None = None, *, padding: int = 0) -> bytes:
    """A right file with these tensors in this order; ``padding`` spaces in the header shift all offsets."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    return encode(json.dumps(header) + " " * padding, b"".join(content for _, _, content in tensors.values()))


def entry(dtype: str, shape: Sequence[int], seed: int = 0) -> Entry:
    """A tensor of random bytes."""
    elements = 1
    for size in shape:
        elements *= size
    return dtype, shape, noise(elements * DTYPE_BITS[dtype] // 8, seed)


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Random bytes, the same for the same arguments."""
    return random.Random(seed).randbytes(nbytes)


def index(weight_map: Mapping[str, str]) -> bytes:
    """The text of a model.safetensors.index.json."""
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}).encode()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The memory of a tensor, whatever its element type means: NaNs are compared by their bits."""
    tensor = tensor.detach().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.itemsize) if tensor.numel() else b""
