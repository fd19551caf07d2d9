"""Items of a training checkpoint by ``torch.load``, which runs nothing (``weights_only``), and why it refuses some."""

from __future__ import annotations

import io
import re

import torch

from ...errors import CheckpointError
from ...formats.item_expansion import check_expansion
from .files import COPY_AGAIN

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
_REFUSED = re.compile(r"Unsupported global: GLOBAL (\S+) was not an allowed global")
_OWN_WORDS = re.compile(r"WeightsUnpickler error:\s*(\S[^\n]*)")
"""What torch.load says itself, after advice of many lines."""
_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


def load_item(content: bytes, name: str, file: str, offset: int) -> torch.Tensor:
    """The tensor of a stored item.

    Raises:
        CheckpointError: it is none, or is of a class that is not torch's own.
    """
    try:
        check_expansion(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Of damaged bytes, torch.load raises what it comes across.
    except Exception as error:
        refused = _REFUSED.search(_plain_text(str(error)))
        if refused is not None:
            raise _of_a_class(refused[1], name, file, offset) from error
        raise CheckpointError(
            f"the item of {name!r} cannot be read as a tensor: {torch_load_words(error)}",
            file=file,
            offset=offset,
            hint=COPY_AGAIN,
        ) from error
    if not isinstance(loaded, torch.Tensor):
        raise CheckpointError(
            f"the item of {name!r} is a {type(loaded).__name__}, not a tensor", file=file, offset=offset
        )
    return loaded


def check_not_quantised(dtype: torch.dtype, name: str, file: str, offset: int = 0) -> None:
    """Refuse torch's quantised tensors: their scales lie beside their bytes, and torch cannot fill one by copying.

    Raises:
        CheckpointError: the type is a quantised one.
    """
    if dtype in _QUANTISED:
        raise CheckpointError(
            f"{name!r} is a quantised tensor of torch ({dtype}), which has scales beside its elements and cannot be "
            "put together from its bytes",
            file=file,
            offset=offset,
            hint="save its dequantize(), or its int_repr() and its scales as tensors of their own; key_mapping can "
            "leave it out",
        )


def torch_load_words(error: Exception) -> str:
    """One line of what ``torch.load`` says, without advice and terminal codes; the kind of error if it is silent."""
    text = _plain_text(str(error)).strip()
    own = _OWN_WORDS.search(text)
    return own[1] if own is not None else (text.splitlines() or [type(error).__name__])[0]


def _of_a_class(refused: str, name: str, file: str, offset: int) -> CheckpointError:
    return CheckpointError(
        f"{name!r} was saved as a tensor of {refused}, which is not one of torch's plain tensors; nothing was run",
        file=file,
        offset=offset,
        hint="save it as a plain tensor: dequantize() of a quantised one, full_tensor() of a distributed one, "
        "as_subclass(torch.Tensor) of others; or, if you trust the checkpoint, import the class and give it to "
        "torch.serialization.add_safe_globals",
    )


def _plain_text(text: str) -> str:
    """A text without the codes by which a terminal changes colours, and without other control characters."""
    return _TERMINAL_CODES.sub("", text)
