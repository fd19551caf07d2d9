"""What lies beside a model's weights and belongs to it: configuration, tokenizer, and the like."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..sources.byte_stream import open_stream
from ..sources.source import Source

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")
_COPY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Companion:
    """A file beside the weights: its name and its size in bytes."""

    name: str
    nbytes: int


def is_companion(name: str) -> bool:
    """Whether a file of this name in a model's directory is neither weights, nor an index of them, nor hidden."""
    return not name.startswith(".") and not name.endswith((*_WEIGHTS, ".index.json"))


def companions_in(source: Source, directory: str) -> list[Companion]:
    """What lies right in ``directory`` beside the weights; each is looked at before anything is copied.

    Links are followed within the directory (Kubernetes mounts files so), and into the blobs of a Hugging Face cache.

    Raises:
        CheckpointError: a file cannot be opened, or is a link that leads elsewhere: who copies and publishes the
            directory would publish what the link points to.
    """
    found = []
    for name in filter(is_companion, source.list(directory)):
        path = os.path.join(directory, name)
        if os.path.islink(path):
            _check_link(path, directory)
        file = source.open(path)
        found.append(Companion(name, file.size))
        file.close()
    return found


def copy_companions(source: Source, directory: str, companions: Iterable[Companion], target: Path) -> None:
    """Copy files of ``directory`` into ``target``.

    Raises:
        CheckpointError: a file cannot be read.
        OSError: it cannot be written.
    """
    for companion in companions:
        path = os.path.join(directory, companion.name)
        with (
            open_stream(source, path, _COPY_BYTES) as content,
            open(target / companion.name, "wb") as copy,
        ):
            shutil.copyfileobj(content, copy, _COPY_BYTES)


def _check_link(path: str, directory: str) -> None:
    home = os.path.realpath(directory)
    allowed = [home]
    if os.path.basename(os.path.dirname(home)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
    place = os.path.realpath(path)
    if not any(place.startswith(f"{root.rstrip('/')}/") for root in allowed):
        raise CheckpointError(
            f"this is a link that leads out of the checkpoint, to {place}; it is not followed",
            file=path,
            hint="copy the file there if it belongs to the model, or delete the link",
        )
