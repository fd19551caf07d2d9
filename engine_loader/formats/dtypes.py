"""The element types of safetensors, and the torch dtype for each.

The list is that of the safetensors 0.8 format. torch is imported only by ``torch_dtype``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, by the name that stands in a header."""

_TORCH_NAMES = {
    "BOOL": "bool",
    # torch packs two 4-bit numbers into an element of a byte, along the last dimension.
    "F4": "float4_e2m1fn_x2",
    # torch has no 6-bit type: tensors of packed bytes are handed out.
    "F6_E2M3": "uint8",
    "F6_E3M2": "uint8",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


@cache
def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype in which tensors of the safetensors type ``dtype`` are handed out.

    Raises:
        CheckpointError: the installed torch is too old to have the dtype.
    """
    import torch

    found = getattr(torch, _TORCH_NAMES[dtype], None)
    if found is None:
        raise CheckpointError(
            f"torch {torch.__version__} has no dtype for {dtype}",
            hint=f"install a torch that has torch.{_TORCH_NAMES[dtype]}",
        )
    return found  # type: ignore[no-any-return]


def header_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a safetensors header for a torch tensor of ``shape``: what ``torch_shape`` takes back."""
    bits = DTYPE_BITS[dtype]
    return shape if bits >= 8 or not shape else (*shape[:-1], shape[-1] * 8 // bits)


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the torch tensor for a header's ``dtype`` and ``shape``.

    Only types smaller than a byte have another shape in torch: the last dimension counts bytes (F4: pairs of numbers).

    Raises:
        CheckpointError: a row of the last dimension is not a whole number of bytes, so no tensor has this shape.
    """
    bits = DTYPE_BITS[dtype]
    if bits >= 8:
        return shape
    if not shape or shape[-1] * bits % 8:
        raise CheckpointError(f"{dtype} {list(shape)} cannot be a torch tensor: its last dimension is not whole bytes")
    return (*shape[:-1], shape[-1] * bits // 8)
