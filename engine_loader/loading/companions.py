"""What lies beside a model's weights and belongs to it: configuration, tokenizer, and the like."""

from __future__ import annotations

import os
from pathlib import Path

from ..sources.source import Source
from .shards import read_small_file

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")


def is_companion(name: str) -> bool:
    """Whether a file of this name in a model's directory is neither weights, nor an index of them, nor hidden."""
    return not name.startswith(".") and not name.endswith((*_WEIGHTS, ".index.json"))


def copy_companions(source: Source, directory: str, target: Path) -> None:
    """Copy what lies right in ``directory`` beside the weights into ``target``.

    Raises:
        CheckpointError: a file cannot be read.
        OSError: it cannot be written.
    """
    for name in filter(is_companion, source.list(directory)):
        (target / name).write_bytes(read_small_file(source, os.path.join(directory, name)))
