"""What became of a restore or a save, for logs, commands and other processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["restored", "saved", "complete", "nothing", "refused", "interrupted", "failed", "off"]


@dataclass
class Outcome:
    """How an operation ended.

    Attributes:
        status: "complete": everything was already in place; "nothing": there was nothing to restore or save;
            "refused": only packs that are not to be trusted were there.
        files: restored or saved.
        bytes: of their content.
        pack_bytes: read from or written to the store.
        packs: read or written.
        seconds: that it took.
        verdict: what the cache was good for ("hit", "partial", "miss"); empty where nobody looked.
        reasons: why it was no hit, a line each.
        messages: what a person should know, a warning each.
        notes: what a person may like to know.
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

    @property
    def in_place(self) -> bool:
        """Whether a cache is there that an engine can use."""
        return self.status in ("restored", "complete")

    @property
    def failed(self) -> bool:
        """Whether it did not come to its end."""
        return self.status in ("refused", "interrupted", "failed")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
