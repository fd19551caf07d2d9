"""The outcome of a restore or a save, for logs, commands and other processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..store_reads import Reads

Status = Literal["restored", "saved", "complete", "nothing", "refused", "interrupted", "failed", "off", "suspect"]


@dataclass
class Outcome:
    """How an operation ended.

    Attributes:
        status: "complete": the local caches or the store had everything; "nothing": there was nothing to restore
            or save; "refused": the store had only packs that are not trusted; "suspect": the last engine that started
            with a restore ended before it was ready, and nothing was restored.
        files: restored or saved.
        bytes: of their content.
        pack_bytes: read from or written to the store.
        packs: read or written.
        seconds: that it took.
        verdict: "hit", "partial", "miss" or "refused" (verdict/judge.py); empty where it was not judged.
        reasons: why it was no hit, a line each.
        messages: logged as a warning each.
        notes: logged as information.
        reads: what a restore read of a store in a directory: name in the store -> (offset, size) in bytes.
    """

    status: Status
    files: int = 0
    bytes: int = 0
    pack_bytes: int = 0
    packs: int = 0
    seconds: float = 0.0
    verdict: str = ""
    reasons: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reads: Reads = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        """Whether the local caches hold what the store has."""
        return self.status in ("restored", "complete")

    @property
    def failed(self) -> bool:
        """Whether it was refused, interrupted or failed."""
        return self.status in ("refused", "interrupted", "failed")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
