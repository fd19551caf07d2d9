"""What of a key's packs a restore found damaged or unreadable, and does without."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from ..packs.manifest import PackedFile
from ..packs.pack import Pack

_MOST_MESSAGES = 3


@dataclass
class Refused:
    """Frames and packs that are not used.

    Attributes:
        frames: damaged ones, each as (name of its pack, index).
        packs: names of packs of which nothing is used -> why.
        gone: whether one of them was deleted since it was listed: another may hold its files.
        unreadable: whether the store failed for one of them.
        reasons: a line each.
    """

    frames: set[tuple[str, int]] = field(default_factory=set)
    packs: dict[str, str] = field(default_factory=dict)
    gone: bool = False
    unreadable: bool = False
    reasons: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.frames or self.packs)

    def add(self, other: Refused) -> None:
        """Do without what ``other`` has, too."""
        self.frames |= other.frames
        self.packs |= other.packs
        self.unreadable |= other.unreadable
        self.reasons += other.reasons

    def usable(self, packs: list[Pack]) -> list[Pack]:
        """Those of ``packs`` of which something may be used."""
        return [pack for pack in packs if pack.stored.name not in self.packs]

    def files(self, pack: Pack) -> list[PackedFile]:
        """Those of a pack's files that are not used."""
        if pack.stored.name in self.packs:
            return list(pack.manifest.files)
        return [file for file in pack.manifest.files if (pack.stored.name, file.frame) in self.frames]

    def messages(self) -> list[str]:
        """A few lines for a person."""
        shown = self.reasons[:_MOST_MESSAGES]
        if left := len(self.reasons) - len(shown):
            shown[-1] += f" (and {left} more: run `engine-loader compile-cache verify`)"
        return shown

    def damaged(self) -> dict[str, list[int]]:
        """Name of a pack -> its damaged frames."""
        found: dict[str, list[int]] = defaultdict(list)
        for name, frame in sorted(self.frames):
            found[name].append(frame)
        return dict(found)
