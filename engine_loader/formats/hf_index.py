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


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A checked index.

    Attributes:
        file: its path.
        weight_map: tensor name -> file name, relative to the index's directory.
    """

    file: str
    weight_map: Mapping[str, str]

    def path_of(self, shard: str) -> str:
        """The path of one of its files."""
        return self.file.removesuffix(INDEX_NAME) + shard

    @property
    def shards(self) -> list[str]:
        """The file names, each once, in the order of their first tensor."""
        return list(dict.fromkeys(self.weight_map.values()))


def parse_index(text: bytes, file: str) -> ShardIndex:
    """Check the text of an index.

    Raises:
        CheckpointError: it is not JSON, has no weight_map of strings, or names a file outside its directory.
    """
    try:
        parsed: Any = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unambiguous(pairs, file))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the index is not valid JSON: {error}", file=file, hint="download it again") from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError("the index has no weight_map of tensor names to file names", file=file)
    if not weight_map:
        raise CheckpointError("the index names no tensors", file=file, hint="download it again")
    for shard in set(weight_map.values()):
        _check_shard_name(shard, file)
    return ShardIndex(file, weight_map)


def _unambiguous(pairs: list[tuple[str, Any]], file: str) -> dict[str, Any]:
    """The object of ``pairs``; a key may stand twice with the same value, as tools that merge indexes leave it."""
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if unique.setdefault(key, value) != value:
            raise CheckpointError(f"the index has {key!r} twice, with different values", file=file)
    return unique


def _check_shard_name(shard: str, file: str) -> None:
    # An index comes from outside: it must not make us read files elsewhere.
    if not shard or "\0" in shard or "\\" in shard or posixpath.isabs(shard) or ".." in shard.split("/"):
        raise CheckpointError(f"the index names {shard!r}, which is not a file of its directory", file=file)
    if not shard.isprintable():
        raise CheckpointError(f"the index names {shard!r}, which is not a file name", file=file)
