"""What a restore on this node found damaged, kept for the save behind it.

The end of a pack, with its manifest, may be sound where a frame is not: to a save that reads manifests alone, the store
would seem to have those files, for ever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ..directories import STATE
from ..trust import make_private

_NAME = "damaged.json"


def note_damage(root: Path, store: str, frames: Collection[tuple[str, int]]) -> None:
    """Write into the cache ``root`` which frames of the store, each as (name of its pack, index), are damaged. It takes
    the place of what was noted before.
    """
    path = root / STATE / _NAME
    if not frames:
        path.unlink(missing_ok=True)
        return
    make_private(path.parent)
    unfinished = path.with_name(f"{_NAME}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"store": store, "frames": sorted(frames)}))
    unfinished.replace(path)


def noted_damage(root: Path, store: str) -> set[tuple[str, int]]:
    """What was noted last in the cache ``root`` about this store."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads((root / STATE / _NAME).read_text())
        if value["store"] == store:
            return {(str(name), int(index)) for name, index in value["frames"]}
    return set()
