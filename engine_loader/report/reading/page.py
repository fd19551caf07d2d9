"""A start as one page of HTML: nothing is loaded, no script runs, and it is light or dark as the reader has it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from typing import Any

from ...escaping import printable
from .account import Account
from .critical_path import seconds_by_phase
from .rows import Row, rows_of
from .timeline import Process, ToldStall

_SHORTEST_SHOWN = 0.002  # of the whole
_TICKS = 6

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #ffffff; --line: #d8dee4; --band: #f3f5f7;
  --work: #1f6feb; --path: #c2410c; --wait: #a8b1bb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --paper: #0d1117; --line: #30363d;
  --band: #161b22; --work: #58a6ff; --path: #f0883e; --wait: #57606a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 75rem; color: var(--ink); background: var(--paper);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: 0 0 .5rem; }
.soft { color: var(--soft); }
.row { display: grid; grid-template-columns: minmax(9rem, 17rem) 4.5rem 1fr; gap: .6rem; align-items: center;
  min-height: 1.45rem; }
.row:nth-child(odd) { background: var(--band); }
.name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.seconds { text-align: right; font-variant-numeric: tabular-nums; }
.track { position: relative; height: .8rem; }
.bar { position: absolute; top: 0; bottom: 0; min-width: 2px; border-radius: 2px; background: var(--work); }
.bar.quiet { background: var(--wait); }
.bar.path { background: var(--path); }
.ticks { color: var(--soft); font-size: .8rem; }
.ticks .track { height: 1.1rem; }
.ticks .track span { position: absolute; white-space: nowrap; transform: translateX(-50%); }
.ticks .track span:first-child { transform: none; }
.ticks .track span:last-child { transform: translateX(-100%); }
.legend span { display: inline-block; margin-right: 1.2rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: -1px; }
li { margin-bottom: .35rem; }
@media (max-width: 40rem) {
  body { padding: .8rem; font-size: 14px; }
  .row { grid-template-columns: 1fr auto; gap: 0 .6rem; padding: .2rem 0; }
  .row .track { grid-column: 1 / -1; }
  .ticks { display: block; }
  .ticks .name, .ticks .seconds { display: none; }
}
"""


def page_of(account: Account) -> str:
    """The page. All texts from outside are escaped."""
    timeline = account.timeline
    whole = max(timeline.end, 1e-9)
    title = _text(timeline.title or "start")
    ready = f"ready after {timeline.ready:.1f} s" if timeline.ready is not None else "did not become ready"
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(timeline.began_wall))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}: {ready}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}: {ready}</h1>",
        f'<p class="soft">{_text(timeline.name)}, began {began}; {account.coverage:.0%} of the time is in known '
        "phases</p>",
    ]
    if account.advice:
        parts.append("<h2>What would help most</h2><ul>")
        parts += [f"<li>{_text(one.text)}</li>" for one in account.advice]
        parts.append("</ul>")
    if timeline.stalls:
        parts.append("<h2>Stalls</h2><ul>")
        parts += [f"<li>{_text(_said(stall))}</li>" for stall in timeline.stalls]
        parts.append("</ul>")
    parts.append("<h2>The time to ready</h2><div>")
    began_at = 0.0
    for name, seconds in seconds_by_phase(account.path).items():
        if seconds >= _SHORTEST_SHOWN * whole:
            parts.append(_row(name or "unknown", seconds, [(began_at, began_at + seconds)], whole, "path"))
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
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _process(account: Account, process: Process, whole: float) -> Iterator[str]:
    rows = rows_of(account.timeline, process, shortest_s=_SHORTEST_SHOWN * whole)
    if not rows:
        return
    where = f"pid {process.pid}, {_text(process.node)}"
    yield f'<h3>{_text(process.title)} <span class="soft">({where})</span></h3><div>'
    for row in rows:
        on_path = [
            (stretch.began, stretch.ended)
            for stretch in account.path
            if any(stretch.phase is one for one in row.phases)
        ]
        kind = "quiet" if row.waits or row.beside else ""
        yield _row(row.title, row.seconds, row.pieces, whole, kind, on_path, depth=row.depth, hint=_hint(row))
    yield "</div>"


def _row(
    name: str,
    seconds: float,
    pieces: list[tuple[float, float]],
    whole: float,
    kind: str,
    on_path: list[tuple[float, float]] | None = None,
    *,
    depth: int = 0,
    hint: str = "",
) -> str:
    bars = "".join(_bar(piece, whole, kind) for piece in pieces)
    bars += "".join(_bar(piece, whole, "path") for piece in on_path or ())
    label = _text(name)
    return (
        f'<div class="row" title="{label}{_text(hint)}"><div class="name" style="padding-left:{depth * 0.9:.1f}rem">'
        f'{label}</div><div class="seconds">{seconds:.2f} s</div><div class="track">{bars}</div></div>'
    )


def _bar(piece: tuple[float, float], whole: float, kind: str) -> str:
    left, width = 100 * piece[0] / whole, 100 * (piece[1] - piece[0]) / whole
    return f'<div class="bar {kind}" style="left:{left:.3f}%;width:{width:.3f}%"></div>'


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


def _text(text: str) -> str:
    return escape(printable(text))
