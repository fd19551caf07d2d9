"""Sets of files that the ranks of an engine compare with one another: restored whole, or not at all.

FlashInfer's autotuner measures kernels with all ranks of a group at once, and each rank that finds its part in a file
does not measure. Where some find it and others do not, the others wait for them: engines hung so for half an hour.

vLLM: ``flashinfer_autotune_cache/…/autotune_configs_dp<d>_rank<r>.json`` (model_executor/warmup/kernel_warmup.py);
SGLang: ``flashinfer/autotune/…/rank_tp<t>_pp<p>_dp<d>.json`` (model_executor/runner/flashinfer_autotune.py).
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ..packs.manifest import PackedFile
from ..packs.pack import Pack
from .missing import MissingFiles

_VLLM = re.compile(
    r"(?P<set>(?:vllm/flashinfer_autotune_cache|flashinfer_autotune)/.+)/autotune_configs_dp(\d+)_rank(\d+)\.json"
)
_SGLANG = re.compile(r"(?P<set>sglang/flashinfer/autotune/.+)/rank_tp(\d+)_pp(\d+)_dp(\d+)\.json")
_SHOWN = 4

Rank = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How many ranks an engine has on all its nodes.

    Attributes:
        tp, pp, dp: sizes of tensor, pipeline and data parallelism.
        dp_attention: data parallelism is among the ranks of tensor parallelism (SGLang), not beside them.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    dp_attention: bool = False


class Part(NamedTuple):
    """A rank's part of a set.

    Attributes:
        name: of the set: the directory.
        rank: the numbers in the file's name.
    """

    name: str
    rank: Rank


def part_of(path: str) -> Part | None:
    """The part that the file at ``path`` (as in packs) is; None if ranks do not compare it."""
    found = _VLLM.fullmatch(path) or _SGLANG.fullmatch(path)
    return None if found is None else Part(found["set"], tuple(int(text) for text in found.groups()[1:]))


def sets_of(files: Iterable[PackedFile]) -> set[str]:
    """Names of the sets that these files are parts of."""
    return {part.name for file in files if (part := part_of(file.path)) is not None}


def leave_out_partial_sets(
    missing: MissingFiles,
    files: Mapping[str, tuple[Pack, PackedFile]],
    directories: Mapping[str, Path],
    layout: Layout | None,
) -> tuple[MissingFiles, list[str]]:
    """``missing`` without sets that would not be whole, and a message about each.

    Args:
        missing: files of ``files`` that are not on this node.
        files: path -> the file that packs have of it.
        directories: name of a cache -> its directory on this node.
        layout: of the engine; None where it is not known, and no set can be told to be whole.
    """
    refused: dict[str, str] = {}
    sets = _sets(files)
    wanted = {file.path for frames in missing.files.values() for files_ in frames.values() for file in files_ if sets}
    for name, members in sets.items():
        if wanted.isdisjoint(file.path for file in members.values()):
            continue
        reason = _partial(members, layout) or _mixed(members, wanted, directories)
        if reason:
            refused[name] = reason
    messages = [
        f"the autotune tables {name} are left out: {reason}; ranks that find a part of them wait for those that do not"
        for name, reason in refused.items()
    ]
    if not refused:
        return missing, []
    return missing.where(lambda file: (part := part_of(file.path)) is None or part.name not in refused), messages


def parts_of_broken_sets(wanted: Iterable[PackedFile], done: Collection[PackedFile]) -> list[PackedFile]:
    """Those of ``done`` whose set has other files in ``wanted`` that were not unpacked."""
    broken = {part.name for file in set(wanted) - set(done) if (part := part_of(file.path)) is not None}
    return [file for file in done if (part := part_of(file.path)) is not None and part.name in broken]


def _sets(files: Mapping[str, tuple[Pack, PackedFile]]) -> dict[str, dict[Rank, PackedFile]]:
    found: dict[str, dict[Rank, PackedFile]] = defaultdict(dict)
    for path, (_, file) in files.items():
        if (part := part_of(path)) is not None:
            found[part.name][part.rank] = file
    return found


def _partial(members: Mapping[Rank, PackedFile], layout: Layout | None) -> str | None:
    """Why a set is not whole; None if it is."""
    if layout is None:
        return "how many ranks there are is not known here"
    present, expected = _of_vllm(members, layout) if len(next(iter(members))) == 2 else _of_sglang(members, layout)
    lacking = sorted(expected - present)
    if lacking:
        shown = ", ".join(_label(rank) for rank in lacking[:_SHOWN]) + (", …" if len(lacking) > _SHOWN else "")
        return f"of {len(expected)} ranks, the store lacks the part of {shown}"
    return f"they are of {len(present)} ranks, here are {len(expected)}" if present - expected else None


def _of_vllm(members: Mapping[Rank, PackedFile], layout: Layout) -> tuple[set[Rank], set[Rank]]:
    """(ranks that are there, ranks that must be), each (data-parallel rank, rank)."""
    replica = layout.tp * layout.pp
    if any(rank >= replica for _, rank in members):  # the replicas are one world, as with expert parallelism
        return set(members), {(rank // replica, rank) for rank in range(replica * layout.dp)}
    return set(members), set(product(range(layout.dp), range(replica)))


def _of_sglang(members: Mapping[Rank, PackedFile], layout: Layout) -> tuple[set[Rank], set[Rank]]:
    """(ranks that are there, ranks that must be), each (tensor, pipeline, data-parallel rank)."""
    if layout.dp_attention:
        return {(tp, pp, 0) for tp, pp, _ in members}, set(product(range(layout.tp), range(layout.pp), (0,)))
    return set(members), set(product(range(layout.tp), range(layout.pp), range(layout.dp)))


def _label(rank: Rank) -> str:
    if len(rank) == 2:
        return f"rank {rank[1]} (data parallel {rank[0]})"
    return "rank " + " ".join(f"{name}{number}" for name, number in zip(("tp", "pp", "dp"), rank, strict=True))


def _mixed(members: Mapping[Rank, PackedFile], wanted: set[str], directories: Mapping[str, Path]) -> str | None:
    """Why what is here and what the store has are not one set; None if they are."""
    for rank, file in members.items():
        if file.path in wanted:
            continue
        local = directories[file.root] / file.path.partition("/")[2]
        try:
            same = hashlib.sha256(local.read_bytes()).hexdigest() == file.sha256
        except OSError:
            same = False
        if not same:
            return f"the part of {_label(rank)} on this node is another than the store's"
    return None
