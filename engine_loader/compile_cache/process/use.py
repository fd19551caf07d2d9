"""Notes for the save of an engine: its ranks say which directories they use and what their engine's key is made of, and
its restore says what was left alone.
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
_RESTORE = "restore-of-"


@dataclass(frozen=True)
class Use:
    """What one rank noted.

    Attributes:
        rank: its name.
        directories: that hold what it compiled or loaded.
        factors: name -> value of what its engine's key is made of.
        engine: when its engine's start began (ns since the epoch), which is the engine's name on this node; 0: the rank
            does not know (a worker that something else started).
        scope: of its engine's key; empty: not known.
    """

    rank: str
    directories: tuple[str, ...]
    factors: Mapping[str, Any]
    engine: int = 0
    scope: str = ""

    @property
    def factors_path(self) -> str:
        """Where the factors stand in a manifest."""
        return f"engine/{short_hash(json.dumps(self.factors, sort_keys=True))}/{self.rank}"

    def is_of(self, engine: int, scope: str) -> bool:
        """Whether this is a note of the engine ``engine`` of the scope ``scope``, as far as the note tells."""
        return self.engine == engine if self.engine and engine else self.is_like(scope)

    def is_like(self, scope: str) -> bool:
        """Whether this is of an engine that shares the files of ``scope``."""
        return self.scope in ("", scope)


def note_use(
    root: Path,
    rank: str,
    directories: Iterable[str],
    factors: Mapping[str, Any],
    *,
    engine: int | None = None,
    scope: str = "",
) -> None:
    """Write the note of a rank into the cache ``root``. Each engine of a node has notes of its own."""
    value = {"rank": rank, "directories": sorted(directories), "factors": factors, "engine": engine, "scope": scope}
    _write(root, f"{engine or short_hash(scope)}.{rank}", value)


def noted_uses(root: Path, since_ns: int = 0) -> list[Use]:
    """The notes of all engines, written into the cache ``root`` since ``since_ns`` (nanoseconds since the epoch)."""
    found = []
    for path in sorted((root / STATE / NOTES).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if path.stat().st_mtime_ns >= since_ns and not path.name.startswith(_RESTORE):
                value = json.loads(path.read_text())
                found.append(
                    Use(
                        str(value["rank"]),
                        tuple(map(str, value["directories"])),
                        dict(value["factors"]),
                        int(value.get("engine") or 0),
                        str(value.get("scope") or ""),
                    )
                )
    return found


def note_restore(root: Path, engine: int, left_alone: Iterable[str]) -> None:
    """Note what the restore for an engine left alone: files that the engine could not use, whatever the store has."""
    _write(root, f"{_RESTORE}{engine}", list(left_alone))


def left_alone(root: Path, engine: int) -> list[str]:
    """What ``note_restore`` noted for an engine."""
    with suppress(OSError, ValueError, TypeError):
        return list(map(str, json.loads((root / STATE / NOTES / f"{_RESTORE}{engine}.json").read_text())))
    return []


def _write(root: Path, name: str, value: object) -> None:
    notes = root / STATE / NOTES
    make_private(notes)
    unfinished = notes / f"{name}.{os.getpid()}.tmp"
    unfinished.write_text(json.dumps(value, default=str))
    unfinished.replace(notes / f"{name}.json")
