"""Notes that the ranks of an engine leave for the save: which directories they use, and what their engine's key is
made of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..directories import STATE
from ..host.hashes import short_hash
from ..trust import make_private

NOTES = "used"


@dataclass(frozen=True)
class Use:
    """What one rank noted.

    Attributes:
        rank: its name.
        directories: that hold what it compiled or loaded.
        factors: name -> value of what its engine's key is made of.
    """

    rank: str
    directories: tuple[str, ...]
    factors: Mapping[str, Any]

    @property
    def factors_path(self) -> str:
        """Where the factors stand in a manifest."""
        return f"engine/{short_hash(json.dumps(self.factors, sort_keys=True))}/{self.rank}"


def note_use(root: Path, rank: str, directories: Iterable[str], factors: Mapping[str, Any]) -> None:
    """Write the note of a rank into the cache ``root``."""
    notes = root / STATE / NOTES
    make_private(notes)
    text = json.dumps({"rank": rank, "directories": sorted(directories), "factors": factors}, default=str)
    unfinished = notes / f"{rank}.{os.getpid()}.tmp"
    unfinished.write_text(text)
    unfinished.replace(notes / f"{rank}.json")


def noted_uses(root: Path, since_ns: int) -> list[Use]:
    """The notes written into the cache ``root`` since ``since_ns`` (nanoseconds since the epoch)."""
    found = []
    for path in sorted((root / STATE / NOTES).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if path.stat().st_mtime_ns >= since_ns:
                value = json.loads(path.read_text())
                found.append(Use(str(value["rank"]), tuple(map(str, value["directories"])), dict(value["factors"])))
    return found
