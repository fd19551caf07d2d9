"""Names of the files of a sharded_state checkpoint: for every rank its own part of the model's state, as vLLM's
save_sharded_state writes it."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CheckpointError

TENSOR_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
PIPELINE_PATTERN = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
"""vLLM's patterns: of tensor parallelism alone, and with pipeline parallelism."""
_FIELDS = {"rank", "tp_rank", "pp_rank", "part"}


@dataclass(frozen=True, order=True)
class ShardRank:
    """Whose part of the state a file holds: pipeline stage, and tensor-parallel rank within it."""

    pp_rank: int = 0
    tp_rank: int = 0

    def __str__(self) -> str:
        return f"rank {self.tp_rank}" if not self.pp_rank else f"pipeline stage {self.pp_rank}, rank {self.tp_rank}"


def check_pattern(pattern: str) -> str:
    """The pattern, when it is one.

    Raises:
        ValueError: a field is unknown, or it cannot tell parts or ranks apart.
    """
    fields = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    unknown = sorted(set(fields) - _FIELDS)
    if unknown:
        raise ValueError(f"unknown fields {unknown}; there are {sorted(_FIELDS)}")
    if "part" not in fields:
        raise ValueError("it does not have {part}")
    if "/" in pattern:
        raise ValueError("it is the name of a file, without a directory")
    return pattern


def shards_by_rank(names: Iterable[str], pattern: str | None = None) -> dict[ShardRank, list[str]]:
    """The files of each rank among ``names``, by their parts; empty where this is no sharded_state checkpoint.

    Args:
        names: what is in a directory.
        pattern: of the files' names; None: vLLM's.
    """
    for candidate in (pattern,) if pattern else (TENSOR_PATTERN, PIPELINE_PATTERN):
        expression = _expression(candidate)
        found: dict[ShardRank, list[tuple[int, str]]] = {}
        for name in names:
            match = expression.fullmatch(name)
            if match:
                values = match.groupdict()
                tp_rank = values.get("rank") or values.get("tp_rank") or "0"
                rank = ShardRank(int(values.get("pp_rank") or 0), int(tp_rank))
                found.setdefault(rank, []).append((int(values["part"]), name))
        if found:
            return {rank: [name for _, name in sorted(parts)] for rank, parts in sorted(found.items())}
    return {}


def shards_of(shards: dict[ShardRank, list[str]], rank: ShardRank, ranks: int | None, directory: str) -> list[str]:
    """The files of one rank.

    Args:
        shards: as ``shards_by_rank`` found them.
        rank: whose.
        ranks: how many there must be in all, if known.
        directory: for messages.

    Raises:
        CheckpointError: it has none, there are others than asked for, or a part is missing.
    """
    if rank not in shards or (ranks is not None and len(shards) != ranks):
        wanted = "" if ranks is None else f" of {ranks}"
        raise CheckpointError(
            f"there are files of {len(shards)} ranks, and {rank}{wanted} is asked for",
            file=directory,
            hint="a sharded_state checkpoint fits one parallel layout only: engine-loader reshard writes another",
        )
    return shards[rank]


def _expression(pattern: str) -> re.Pattern[str]:
    text, seen = "", set[str]()
    for literal, name, _, _ in string.Formatter().parse(pattern):
        text += re.escape(literal)
        if name is not None:
            text += f"(?P={name})" if name in seen else f"(?P<{name}>\\d+)"
            seen.add(name)
    return re.compile(text)
