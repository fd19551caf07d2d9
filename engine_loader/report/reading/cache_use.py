"""What a start had of the compile cache: the status of its restore, the verdict behind it, and both in words.

The status says what the restore did; whether the engine could use that, only the verdict says, which the save comes to
after the engine is ready.
"""

from __future__ import annotations

from .. import phases
from .timeline import Timeline

IN_PLACE = ("restored", "complete")
"""Statuses of a restore behind which the local caches held what it could bring."""
_WORST_FIRST = ("refused", "miss", "partial", "hit")

_RESTORES = {
    "": "no compile cache was restored (compile_cache.enabled)",
    "restored": "the compile cache was restored",
    "complete": "what the compile cache has was in place already",
    "nothing": "the compile cache had nothing for it yet",
    "suspect": "the compile cache was not restored, since the engine before ended before it was ready with what that "
    "had brought",
    "refused": "what the compile cache has was not taken (refused)",
    "interrupted": "the restore of the compile cache was given up (interrupted)",
    "failed": "the restore of the compile cache failed",
    "off": "the compile cache is switched off",
}
_EXPLAIN = "`engine-loader compile-cache explain` says"
_VERDICTS = {
    "hit": "and nothing was compiled anew (hit)",
    "partial": f"and some was compiled anew beside what it has (partial); {_EXPLAIN} what",
    "miss": f"and did not serve (miss); {_EXPLAIN} why",
    "refused": f"and a local cache was left alone (refused); {_EXPLAIN} which",
    "": f"and no verdict is known; {_EXPLAIN} whether all that it holds was used",
}


def restore_status(timeline: Timeline) -> str:
    """The status of the compile cache's restore ("restored", "nothing", …); "" where there was none."""
    statuses = [str(phase.details.get("status") or "") for _, phase in timeline.phases(phases.RESTORE)]
    return next((status for status in statuses if status in IN_PLACE), next(iter(statuses), ""))


def verdict_of(timeline: Timeline) -> str:
    """The verdict ("hit", "partial", "miss" or "refused"); of several nodes, the worst; "" where none is known."""
    verdicts = {str(phase.details.get("verdict") or "") for _, phase in timeline.phases(phases.SAVE)}
    return next((verdict for verdict in _WORST_FIRST if verdict in verdicts), "")


def has_served(timeline: Timeline) -> bool:
    """Whether the restore brought something, and nothing is known against its having been used."""
    return restore_status(timeline) in IN_PLACE and verdict_of(timeline) in ("hit", "partial", "")


def restore_in_words(status: str) -> str:
    """What the restore did, as a part of a sentence."""
    return _RESTORES.get(status, f"the compile cache was not restored ({status})")


def use_in_words(timeline: Timeline) -> str:
    """What the restore did, and whether that served, as a part of a sentence."""
    return f"{restore_in_words(restore_status(timeline))}, {_VERDICTS[verdict_of(timeline)]}"
