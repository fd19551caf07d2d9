"""When a start will be ready, from earlier ones of the same kind on this node."""

from __future__ import annotations

from collections.abc import Iterable

from .starts import Identity, Summary

_MOST = 5


def prediction(identity: Identity, summaries: Iterable[Summary]) -> str | None:
    """A sentence such as "expected ready in 38 s (last 5: 35-41 s)"; None where there was no start of this kind yet.

    Args:
        identity: what is started.
        summaries: of earlier starts, the oldest first.
    """
    alike = [summary.seconds for summary in summaries if summary.identity.key == identity.key][-_MOST:]
    if not alike:
        return None
    fastest, *_, slowest = in_order = sorted([*alike, *alike])  # twice, so that one is enough
    # The module statistics takes longer to import than a start may spend on this.
    median = (in_order[len(alike) - 1] + in_order[len(alike)]) / 2
    span = f"{fastest:.0f} s" if f"{fastest:.0f}" == f"{slowest:.0f}" else f"{fastest:.0f}-{slowest:.0f} s"
    return f"expected ready in {median:.0f} s (last {len(alike)}: {span})"
