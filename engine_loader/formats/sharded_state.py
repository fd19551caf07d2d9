"""File names of a sharded_state checkpoint: every rank's part of the model's state, as save_sharded_state of vLLM
writes it."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CheckpointError

TENSOR_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
PIPELINE_PATTERN = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
"""Patterns of vLLM: with tensor parallelism alone, and with pipeline parallelism."""
_ONE_LAYOUT = "a sharded_state checkpoint fits one parallel layout only: engine-loader reshard writes another"
_FIELDS = {"rank", "tp_rank", "pp_rank", "part"}


@dataclass(frozen=True, order=True)
class ShardRank:
    """The rank whose part of the state a file holds: pipeline stage, and tensor-parallel rank within the stage."""

    pp_rank: int = 0
    tp_rank: int = 0

    def __str__(self) -> str:
        return f"rank {self.tp_rank}" if not self.pp_rank else f"pipeline stage {self.pp_rank}, rank {self.tp_rank}"


def check_pattern(pattern: str) -> str:
    """Check a pattern of file names, and return it.

    Raises:
        ValueError: a field is unknown, ``{part}`` is missing, or the pattern has a directory.
    """
    fields = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    unknown = sorted(set(fields) - _FIELDS)
    if unknown:
        raise ValueError(f"unknown fields {unknown}; there are {sorted(_FIELDS)}")
    if "part" not in fields:
        raise ValueError("it does not have {part}")
    if "/" in pattern:
        raise ValueError("it must be the name of a file, without a directory")
    return pattern


def shards_by_rank(names: Iterable[str], pattern: str | None = None) -> dict[ShardRank, list[str]]:
    """The files of each rank among ``names``, in the order of their parts; empty if no name fits a pattern.

    Args:
        names: the names of the files in a directory.
        pattern: of the files' names; None: the patterns of vLLM.
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
        shards: the result of ``shards_by_rank``.
        rank: the rank whose files are returned.
        ranks: the number of ranks that the checkpoint must have; None: any.
        directory: for messages.

    Raises:
        CheckpointError: the checkpoint has another number of ranks, or no files of this rank.
    """
    if ranks is not None and len(shards) != ranks:
        raise CheckpointError(
            f"there are files of {len(shards)} ranks, and {rank} of {ranks} is asked for",
            file=directory,
            hint=_ONE_LAYOUT,
        )
    if rank not in shards:
        raise CheckpointError(
            f"there are files of {len(shards)} ranks, but none of {rank}", file=directory, hint=_ONE_LAYOUT
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
