"""model.safetensors.index.json: which shard of a Hugging Face checkpoint holds which tensor."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 30
"""The length up to which an index is read into memory."""
_DOWNLOAD_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A checked index.

    Attributes:
        file: the path of the index.
        weight_map: tensor name -> file name, relative to the index's directory.
    """

    file: str
    weight_map: Mapping[str, str]

    def path_of(self, shard: str) -> str:
        """The path of the shard with this file name."""
        return self.file.removesuffix(INDEX_NAME) + shard

    @property
    def shards(self) -> list[str]:
        """The file names of the shards, each once, in the order of their first tensor."""
        return list(dict.fromkeys(self.weight_map.values()))


def parse_index(text: bytes, file: str) -> ShardIndex:
    """Check the text of an index.

    Raises:
        CheckpointError: it is not JSON, has no weight_map of strings, or names a file outside the index's directory.
    """
    try:
        parsed: Any = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unambiguous(pairs, file))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the index is not valid JSON: {error}", file=file, hint=_DOWNLOAD_AGAIN) from None
    weight_map = _weight_map(parsed, file)
    for shard in set(weight_map.values()):
        _check_shard_name(shard, file)
    return ShardIndex(file, weight_map)


def _weight_map(parsed: Any, file: str) -> dict[str, str]:
    """The object of tensor names and file names in a parsed index."""
    if not isinstance(parsed, dict):
        raise CheckpointError("the index is not a JSON object", file=file, hint=_DOWNLOAD_AGAIN)
    if "weight_map" not in parsed:
        raise CheckpointError("the index has no weight_map of tensor names to file names", file=file)
    weight_map = parsed["weight_map"]
    if not isinstance(weight_map, dict):
        raise CheckpointError("the index's weight_map is not an object of tensor names to file names", file=file)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"the index gives {name!r} a file name that is not a string: {shard!r}", file=file)
    if not weight_map:
        raise CheckpointError("the index names no tensors", file=file, hint=_DOWNLOAD_AGAIN)
    return weight_map


def _unambiguous(pairs: list[tuple[str, Any]], file: str) -> dict[str, Any]:
    """The object of ``pairs``; a key may stand twice if both values are equal, as tools that merge indexes write it."""
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if unique.setdefault(key, value) != value:
            raise CheckpointError(f"the index has {key!r} twice, with different values", file=file)
    return unique


def _check_shard_name(shard: str, file: str) -> None:
    # An index comes from outside: it must not make this process read files elsewhere.
    if not shard:
        raise CheckpointError("the index gives a tensor the empty file name ''", file=file)
    if posixpath.isabs(shard) or ".." in shard.split("/"):
        raise CheckpointError(f"the index names {shard!r}, which is not a file of its directory", file=file)
    if "\\" in shard:
        raise CheckpointError(f"the index names {shard!r}, which has a backslash: paths have '/' here", file=file)
    if not shard.isprintable():
        raise CheckpointError(f"the index names {shard!r}, which is not a file name", file=file)
