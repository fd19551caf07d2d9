"""What a load in direct mode does with each tensor: which bytes it keeps, which it reads for them, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...formats.safetensors import TensorInfo
from ...sources.posix import PosixSource
from ...sources.registry import is_remote
from ...transfer.constructor import REMOTE_GAP_BYTES
from ...transfer.modes import choose_mode
from ...transfer.plan import ExtentRow
from ..sharing import LEAST_BYTES
from .observer import SMALL

if TYPE_CHECKING:
    from ...settings import LoaderSettings

GAP_BYTES = 4 << 10
"""Unwanted bytes between two wanted runs that are read through from the page cache: what a call of preadv costs, in
bytes of a copy."""
WIDE_GAP_BYTES = 128 << 10
"""Unwanted bytes between two wanted runs that are read through from storage: what a read's latency costs, in bytes of
its bandwidth. (The native reader threads use both limits: transfer/native/src/api/api_readers.cpp.)"""
_ALIGNMENT = 4096

_KINDS = (
    ("experts", re.compile(r"\.experts\.|\.experts_|block_sparse_moe\.(input|output)_linear")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.")),
    ("embedding", re.compile(r"embed|(^|\.)(wte|wpe)\.")),
    ("norm", re.compile(r"norm|(^|\.)ln_\w+\.")),
    ("attention", re.compile(r"attn|attention")),
    ("mixer", re.compile(r"mamba|mixer|linear_attn|conv")),
    ("mlp", re.compile(r"mlp|feed_forward|(^|\.)fc\d|dense_\w+_to")),
)


@dataclass
class TensorPlan:
    """What a load does with one tensor.

    Attributes:
        info: the tensor.
        kept_bytes: bytes that go into parameters, or that the engine needed as data.
        read_bytes: bytes that are read from the source, gaps and alignment included.
        extents: pieces that its copies are made of.
        reads: separate ranges of the file that are read.
        ways: how it is read: "whole", "rows" (one piece of it), "runs" (many pieces), "read through" (many pieces,
            gaps included), "as data", "small" (whole, ahead of the engine's code).
        why: operations or methods that needed it as data.
    """

    info: TensorInfo
    kept_bytes: int = 0
    read_bytes: int = 0
    extents: int = 0
    reads: int = 0
    ways: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The kind of layer that the tensor belongs to, by the tensor's name."""
        return next((kind for kind, pattern in _KINDS if pattern.search(self.info.name)), "other")

    def as_dict(self) -> dict[str, Any]:
        """As ``explain-load --json`` prints it."""
        info = self.info
        return {
            "name": info.name,
            "kind": self.kind,
            "file": info.file,
            "file_bytes": info.nbytes,
            "kept_bytes": self.kept_bytes,
            "read_bytes": self.read_bytes,
            "extents": self.extents,
            "reads": self.reads,
            "ways": self.ways or ["not read"],
            "why_as_data": self.why,
        }


class Explanation:
    """Collects what a load does with each tensor; a ``LoadObserver``.

    Attributes:
        tensors: by name, in the order in which the engine was given them.
        obstacle: why the setting ``mode: auto`` would stream this load, or None.
    """

    def __init__(self, settings: LoaderSettings) -> None:
        self.tensors: dict[str, TensorPlan] = {}
        self.obstacle: str | None = None
        self._settings = settings
        self._files: dict[str, tuple[str, bool]] = {}  # by path: how it is read, whether by wide reads

    def on_tensor(self, info: TensorInfo) -> None:
        self._of(info)

    def on_copy(self, info: TensorInfo, extents: Sequence[ExtentRow]) -> None:
        plan = self._of(info)
        gap, align = self._limits(info.file)
        plan.extents += len(extents)
        for _, rows, offset, row_bytes, stride, _, _ in extents:
            plan.kept_bytes += rows * row_bytes
            through = rows > 1 and stride - row_bytes <= gap
            if rows == 1 or through:
                plan.reads += 1
                plan.read_bytes += _spanned(offset, (rows - 1) * stride + row_bytes, align)
            else:
                plan.reads += rows
                plan.read_bytes += sum(_spanned(offset + row * stride, row_bytes, align) for row in range(rows))
            whole = rows * row_bytes == info.nbytes
            _add(plan.ways, "read through" if through else "runs" if rows > 1 else "whole" if whole else "rows")

    def on_read(self, info: TensorInfo, nbytes: int, why: str) -> None:
        plan = self._of(info)
        plan.read_bytes += nbytes
        plan.kept_bytes += nbytes
        plan.reads += 1
        if why == SMALL:
            _add(plan.ways, "small")
        else:
            _add(plan.ways, "as data")
            _add(plan.why, why)

    @property
    def files(self) -> dict[str, str]:
        """By path: the way in which the file is read, and why that one was chosen."""
        return {path: text for path, (text, _) in self._files.items()}

    def totals(self) -> dict[str, dict[str, int]]:
        """Sums by kind of layer, the most bytes in the files first; the sums of all layers ("all") last."""
        kinds: dict[str, dict[str, int]] = {}
        for plan in self.tensors.values():
            for key in (plan.kind, "all"):
                row = kinds.setdefault(key, dict.fromkeys(_COLUMNS, 0))
                values = (
                    1,
                    int(not plan.ways),
                    plan.info.nbytes,
                    plan.kept_bytes,
                    plan.read_bytes,
                    plan.extents,
                    plan.reads,
                )
                for column, value in zip(_COLUMNS, values, strict=True):
                    row[column] += value
        return dict(sorted(kinds.items(), key=lambda item: (item[0] == "all", -item[1]["file_bytes"])))

    def machine_bytes(self, ranks: int) -> tuple[int, int]:
        """Bytes that so many ranks of one machine read together, each for itself and with the setting ``share``.

        An estimate from one rank's load: what it keeps a part of, others keep as large a part of; what it does not
        read, one of them reads.
        """
        apart = together = 0
        for plan in self.tensors.values():
            nbytes = plan.info.nbytes
            reads = plan.read_bytes * ranks if plan.ways else nbytes
            if plan.kind == "experts" and plan.ways == ["whole"]:
                reads = plan.read_bytes  # with expert parallelism, its own
            apart += reads
            together += reads if nbytes < LEAST_BYTES or plan.why else min(reads, nbytes)
        return apart, together

    def as_dict(self, *, tensors: bool = False, ranks: int = 1) -> dict[str, Any]:
        """As ``explain-load --json`` prints it; ``tensors``: with a row for each tensor; ``ranks``: of the machine."""
        materialised = [plan for plan in self.tensors.values() if plan.why]
        answer: dict[str, Any] = {
            "obstacle_to_direct": self.obstacle,
            "cost_model": {"gap_bytes": GAP_BYTES, "wide_gap_bytes": WIDE_GAP_BYTES, "files": self.files},
            "totals": self.totals(),
            "machine": dict(
                zip(("ranks", "read_bytes_apart", "read_bytes"), (ranks, *self.machine_bytes(ranks)), strict=True)
            ),
            "as_data": [plan.as_dict() for plan in materialised],
        }
        if tensors:
            answer["tensors"] = [plan.as_dict() for plan in self.tensors.values()]
        return answer

    def _of(self, info: TensorInfo) -> TensorPlan:
        plan = self.tensors.get(info.name)
        if plan is None:
            plan = self.tensors[info.name] = TensorPlan(info)
        return plan

    def _limits(self, path: str) -> tuple[int, int]:
        """(largest gap that is read through, alignment of reads) of a file, in bytes."""
        if is_remote(path):
            self._files[path] = ("object_store: by ranges", True)
            return REMOTE_GAP_BYTES, 1
        if path not in self._files:
            file = PosixSource().open(path)
            try:
                mode = choose_mode(file, self._settings.read_mode)
            finally:
                file.close()
            self._files[path] = (f"{mode.name}: {mode.reason}", mode.wide or mode.name != "buffered")
        wide = self._files[path][1]
        return (WIDE_GAP_BYTES, _ALIGNMENT if "direct" in self._files[path][0] else 1) if wide else (GAP_BYTES, 1)


_COLUMNS = ("tensors", "not_read", "file_bytes", "kept_bytes", "read_bytes", "extents", "reads")


def _spanned(offset: int, nbytes: int, align: int) -> int:
    """Bytes of the smallest aligned range around ``nbytes`` bytes at ``offset``."""
    return -(-(offset + nbytes) // align) * align - offset // align * align


def _add(texts: list[str], text: str) -> None:
    if text not in texts:
        texts.append(text)
