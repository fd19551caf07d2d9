"""Checkpoints as trainings leave them: torch.distributed.checkpoint, in one piece or in the pieces of several ranks."""

import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from engine_loader import dcp
from engine_loader.dcp import SerializationFormat

Cuts = Sequence[Sequence[int]]
"""Where each dimension is cut; () is nowhere."""


def save_chunked(
    tensors: Mapping[str, torch.Tensor], directory: Path, cuts: Callable[[str, torch.Tensor], Cuts]
) -> None:
    """Write tensors in chunks, those of the same number of all tensors into a file, as each rank of a training does."""
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytearray] = {}
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in tensors.items():
        chunks = []
        for number, (offsets, sizes) in enumerate(boxes(tensor.shape, cuts(name, tensor))):
            part = tensor
            for dim, (begin, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dim, begin, size)
            file = f"__{number}_0.distcp"
            content = files.setdefault(file, bytearray())
            before = len(content)
            content += saved(part.clone(memory_format=torch.contiguous_format))
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            place = _StorageInfo(file, before, len(content) - before)
            places[MetadataIndex(name, torch.Size(offsets), number)] = place
        entries[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    for file, written in files.items():
        (directory / file).write_bytes(written)
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, places)))


def boxes(shape: Sequence[int], cuts: Cuts) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the chunks of a tensor that is cut like this."""
    parts = []
    for dim, size in enumerate(shape):
        edges = [0, *(cuts[dim] if dim < len(cuts) else ()), size]
        parts.append(list(itertools.pairwise(edges)))
    return [
        (tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box))
        for box in itertools.product(*parts)
    ]


def saved(tensor: torch.Tensor) -> bytes:
    """What ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def fsdp(name: str, tensor: torch.Tensor) -> Cuts:
    """Two ranks' rows, not evenly divided where that can be."""
    return [[(tensor.shape[0] + 2) // 2]] if tensor.dim() and tensor.shape[0] > 2 else []


def columns(name: str, tensor: torch.Tensor) -> Cuts:
    """Two tensor-parallel ranks' columns."""
    return [[], [tensor.shape[1] // 3]] if tensor.dim() > 1 else []


def mesh(name: str, tensor: torch.Tensor) -> Cuts:
    """Rows and columns, of four ranks."""
    return [*fsdp(name, tensor), *columns(name, tensor)[1:]]


CUTS = {"fsdp": fsdp, "columns": columns, "mesh": mesh}
KINDS = ("torch_save", "torchs_own", "safetensors", *CUTS)


def save_training(tensors: Mapping[str, torch.Tensor], directory: Path, kind: str, *, prefix: str = "model.") -> Path:
    """A training's checkpoint of a model: with an optimizer's state, where the writer takes it.

    ``kind`` is one of KINDS. The names are the model's with ``prefix`` before them.
    """
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    moments = {f"optimizer.state.{name}.exp_avg": torch.full_like(tensor, 7.0) for name, tensor in tensors.items()}
    if kind in CUTS:
        save_chunked({**named, **moments}, directory, CUTS[kind])
        return directory
    state = {**named, **moments, "step": 11, "lr_scheduler": {"last_lr": [0.1]}}
    writer: Any
    if kind == "torchs_own":
        writer = torch_dcp.FileSystemWriter(directory)
    else:
        items = SerializationFormat.SAFETENSORS if kind == "safetensors" else SerializationFormat.TORCH_SAVE
        writer = dcp.FileSystemWriter(directory, thread_count=2, serialization_format=items)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no process group
        torch_dcp.save(state, storage_writer=writer, no_dist=True)
    return directory


def copy_bare(model: Path, directory: Path) -> Path:
    """A model's directory without its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if "safetensors" not in path.name:
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def trained(model: Path, directory: Path, kind: str, **options: Any) -> Path:
    """The same model as a training left it, beside its configuration and tokenizer."""
    tensors = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return save_training(tensors, copy_bare(model, directory), kind, **options)
