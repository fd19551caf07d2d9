"""Layouts whose tensors differ from transformers' by more than names, as ``key_mapping: torchtitan-llama``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import CheckpointError, EngineLoaderError
from .files import DcpFiles

_LLAMA = "torchtitan-llama"
_SETTING = re.compile(rf"{_LLAMA}(?::(\d+))?")
_LLAMA_NAMES = {
    r"^tok_embeddings[.]": "model.embed_tokens.",
    r"[.]attention[.]w([qkvo])[.]": r".self_attn.\1_proj.",
    r"[.]feed_forward[.]w1[.]": ".mlp.gate_proj.",
    r"[.]feed_forward[.]w2[.]": ".mlp.down_proj.",
    r"[.]feed_forward[.]w3[.]": ".mlp.up_proj.",
    r"[.]attention_norm[.]": ".input_layernorm.",
    r"[.]ffn_norm[.]": ".post_attention_layernorm.",
    r"^layers[.]": "model.layers.",
    r"^norm[.]": "model.norm.",
    r"^output[.]": "lm_head.",
}
_INTERLEAVED = re.compile(r"(?:^|[.])attention[.]w([qk])[.](?:weight|bias)$")
"""The rotated pairs are neighbouring rows here, and half a head apart in transformers and the engines."""


def is_layout(mapping: object) -> bool:
    """Whether a ``key_mapping`` is the name of a built-in one."""
    return isinstance(mapping, str) and _SETTING.fullmatch(mapping) is not None


def rename_llama(name: str) -> str | None:
    """The name in transformers of a tensor of torchtitan's Llama; None for its table of rotations."""
    name = name.removeprefix("model.")
    if name == "freqs_cis":
        return None
    for pattern, replacement in _LLAMA_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class LlamaLayout:
    """torchtitan's Llama: rows of wq and wk are reordered.

    Attributes:
        head_dim: rows of a head.
    """

    head_dim: int

    def changes(self, stored_name: str) -> bool:
        """Whether a tensor's elements are reordered."""
        return _INTERLEAVED.search(stored_name) is not None

    def transformed(self, tensor: torch.Tensor, stored_name: str) -> torch.Tensor:
        """A tensor as transformers has it, in memory of its own; of the same shape.

        Raises:
            CheckpointError: its rows are not whole heads.
        """
        if not self.changes(stored_name):
            return tensor
        rows = tensor.shape[0]
        if rows % self.head_dim:
            raise CheckpointError(
                f"{stored_name!r} has {rows} rows, which are not heads of {self.head_dim}",
                hint=f"give the rows of a head: key_mapping={_LLAMA}:128",
            )
        pairs = tensor.reshape(-1, self.head_dim // 2, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)


def make_layout(mapping: object, files: DcpFiles) -> LlamaLayout | None:
    """The layout that a ``key_mapping`` names; None for any other ``key_mapping``.

    Raises:
        CheckpointError: the rows of a head are neither given nor in the config.json beside the checkpoint.
    """
    found = _SETTING.fullmatch(mapping) if isinstance(mapping, str) else None
    if found is None:
        return None
    head_dim = int(found[1]) if found[1] else _head_dim(files)
    if head_dim is None or head_dim < 2 or head_dim % 2:
        raise CheckpointError(
            f"key_mapping={mapping} needs the number of rows of a head, an even number, which no config.json beside "
            "the checkpoint tells",
            file=files.directory,
            hint=f"give it: key_mapping={_LLAMA}:128, or put the model's config.json there",
        )
    return LlamaLayout(head_dim)


def misread_layout(renamed: Iterable[tuple[str, str]]) -> str | None:
    """A warning where (name, new name) show torchtitan's Llama, renamed to transformers' names and not reordered."""
    for name, new in renamed:
        found = _INTERLEAVED.search(name)
        if found is not None and f"{found[1]}_proj" in new:
            return (
                f"{name!r} looks like torchtitan's Llama, whose rows of wq and wk are in another order than those of "
                f"{new!r}: a model with only the names changed gives wrong answers, unless the training has them in "
                "transformers' order"
            )
    return None


def _head_dim(files: DcpFiles) -> int | None:
    try:
        config: Any = json.loads(files.read_file("config.json"))
        heads = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (EngineLoaderError, OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return heads if isinstance(heads, int) else None
