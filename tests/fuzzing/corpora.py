"""The parsers that read what comes from outside, each with sound inputs to start from."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from engine_loader.compile_cache.packs.manifest import Frame, Manifest, PackedFile
from engine_loader.compile_cache.packs.tar import padding
from engine_loader.formats.dcp_metadata import parse_metadata
from engine_loader.formats.hf_index import parse_index
from engine_loader.formats.safetensors import header_length, parse_header
from engine_loader.formats.torch_item import ENDS_BYTES, item_layout
from engine_loader.loading.training.torch_load import load_item
from tests.compile_cache.support import KEY


class Target(NamedTuple):
    """One parser, and inputs that it takes."""

    parse: Callable[[bytes], object]
    seeds: list[bytes]


def targets() -> dict[str, Target]:
    """The parsers by name."""
    return {
        "metadata": Target(lambda content: parse_metadata(content, "f"), _metadata()),
        "item": Target(_item, [_saved(torch.arange(12).reshape(3, 4).t()), _saved(torch.zeros(700, dtype=torch.int8))]),
        "safetensors": Target(_safetensors, [save({"a": torch.zeros(3, 4), "b": torch.ones(2)}, {"format": "pt"})]),
        "index": Target(lambda content: parse_index(content, "f"), [_index()]),
        "manifest": Target(lambda content: Manifest.from_json(content, "f"), [_manifest()]),
    }


def _item(content: bytes) -> object:
    item_layout(content[:ENDS_BYTES], content[-ENDS_BYTES:], len(content))
    return load_item(content, "a", "f", 0)


def _safetensors(content: bytes) -> object:
    length = header_length(content[:8], len(content), "f")
    return parse_header(content[8 : 8 + length], len(content), "f")


def _metadata() -> list[bytes]:
    size = torch.Size([4, 3])
    halves = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 3])) for at in (0, 2)]
    tensors = {
        "m.w": TensorStorageMetadata(TensorProperties(torch.bfloat16), size, halves),
        "o": BytesStorageMetadata(),
    }
    storage = {
        MetadataIndex("m.w", half.offsets, number): _StorageInfo("__0_0.distcp", 1 << 40, 9)
        for number, half in enumerate(halves)
    }
    plain = {"m.w": ("m", "w"), "o": ("o", 0, (1, 2.5))}
    sets = {"x": [{3}, frozenset({4}), {("a", 5): None}]}  # older protocols call a class for a set
    seeds = []
    for protocol, planner in ((2, plain), (3, plain), (4, plain | sets), (5, plain | sets)):
        whole = Metadata(tensors, planner, storage, StorageMeta(PurePosixPath("/x"), "s", "l"))
        seeds.append(pickle.dumps(whole, protocol))
    return seeds


def _saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def _index() -> bytes:
    shards = {"a": "model-1.safetensors", "b": "sub/model-2.safetensors"}
    return json.dumps({"metadata": {"total_size": 9}, "weight_map": shards}).encode()


def _manifest() -> bytes:
    file = PackedFile("inductor/ab/k.so", 5, 10**18, 0o644, "0" * 64, 0, 0)
    frame = Frame(0, 10, len(file.head()) + file.size + padding(file.size), "1" * 64)
    return Manifest(KEY, 1.5, (file,), (frame,)).to_json()
