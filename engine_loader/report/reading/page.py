"""A start as one page of HTML."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ..bars import as_html, bar_row, document
from .account import Account
from .critical_path import seconds_by_phase
from .rows import Row, rows_of
from .timeline import Process, ToldStall

_SHORTEST_SHOWN = 0.002  # of the whole
_TICKS = 6


def page_of(account: Account) -> str:
    """The page. All texts from outside are escaped."""
    timeline = account.timeline
    whole = max(timeline.end, 1e-9)
    ready = f"ready after {timeline.ready:.1f} s" if timeline.ready is not None else "did not become ready"
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(timeline.began_wall))
    parts = [
        f'<p class="soft">{as_html(timeline.name)}, began {began}; {account.coverage:.0%} of the time is in known '
        "phases</p>"
    ]
    if account.advice:
        parts.append("<h2>What would help most</h2><ul>")
        parts += [f"<li>{as_html(one.text)}</li>" for one in account.advice]
        parts.append("</ul>")
    if timeline.stalls:
        parts.append("<h2>Stalls</h2><ul>")
        parts += [f"<li>{as_html(_said(stall))}</li>" for stall in timeline.stalls]
        parts.append("</ul>")
    parts.append("<h2>The time to ready</h2><div>")
    began_at = 0.0
    for name, seconds in seconds_by_phase(account.path).items():
        if seconds >= _SHORTEST_SHOWN * whole:
            parts.append(
                bar_row(name or "unknown", f"{seconds:.2f} s", [(began_at, began_at + seconds)], whole, "path")
            )
            began_at += seconds
    parts.append("</div><h2>Processes</h2>")
    parts.append(
        '<p class="legend soft"><span><i style="background:var(--path)"></i>the time to ready depends on it</span>'
        '<span><i style="background:var(--work)"></i>other work</span>'
        '<span><i style="background:var(--wait)"></i>waits, or runs beside the start</span></p>'
    )
    parts.append(_ticks(whole))
    for process in timeline.processes:
        parts += _process(account, process, whole)
    return document(f"{timeline.title or 'start'}: {ready}", parts)


def _process(account: Account, process: Process, whole: float) -> Iterator[str]:
    rows = rows_of(account.timeline, process, shortest_s=_SHORTEST_SHOWN * whole)
    if not rows:
        return
    where = f"pid {process.pid}, {as_html(process.node)}"
    yield f'<h3>{as_html(process.title)} <span class="soft">({where})</span></h3><div>'
    for row in rows:
        on_path = [
            (stretch.began, stretch.ended)
            for stretch in account.path
            if any(stretch.phase is one for one in row.phases)
        ]
        kind = "quiet" if row.waits or row.beside else ""
        figure = f"{row.seconds:.2f} s"
        yield bar_row(row.title, figure, row.pieces, whole, kind, on_path, depth=row.depth, hint=_hint(row))
    yield "</div>"


def _ticks(whole: float) -> str:
    marks = "".join(
        f'<span style="left:{100 * number / _TICKS:.2f}%">{whole * number / _TICKS:.1f} s</span>'
        for number in range(_TICKS + 1)
    )
    return (
        '<div class="row ticks"><div class="name"></div><div class="seconds"></div>'
        f'<div class="track">{marks}</div></div>'
    )


def _said(stall: ToldStall) -> str:
    return f"{stall.process.title}, after {stall.at:.0f} s: {stall.text}"


def _hint(row: Row) -> str:
    details: dict[str, Any] = {}
    for phase in row.phases:
        details |= phase.details
    return "".join(f"; {name}: {value}" for name, value in details.items())
