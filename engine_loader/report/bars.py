"""Bars of a page of HTML: nothing is loaded, no script runs, and it is light or dark as the reader has it.

All texts are escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from ..escaping import printable

Piece = tuple[float, float]

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
.row { display: grid; grid-template-columns: minmax(9rem, 17rem) 6rem 1fr; gap: .6rem; align-items: center;
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


def document(title: str, parts: Iterable[str]) -> str:
    """A page with this title and these parts of HTML."""
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{as_html(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{as_html(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>\n"])


def bar_row(
    name: str,
    figure: str,
    pieces: Iterable[Piece],
    whole: float,
    kind: str = "",
    on_path: Iterable[Piece] = (),
    *,
    depth: int = 0,
    hint: str = "",
) -> str:
    """A row: a name, a figure, and bars.

    Args:
        name: what it is about.
        figure: with its unit.
        pieces: where each bar begins and ends, of ``whole``.
        whole: what the whole width stands for.
        kind: "", "quiet" or "path": the bars' colour.
        on_path: bars in the colour of "path", over the others.
        depth: how far the name is moved in.
        hint: more, for whoever points at it.
    """
    bars = "".join(_bar(piece, whole, kind) for piece in pieces)
    bars += "".join(_bar(piece, whole, "path") for piece in on_path)
    label = as_html(name)
    return (
        f'<div class="row" title="{label}{as_html(hint)}"><div class="name" style="padding-left:{depth * 0.9:.1f}rem">'
        f'{label}</div><div class="seconds">{as_html(figure)}</div><div class="track">{bars}</div></div>'
    )


def as_html(text: str) -> str:
    """A text from outside as a part of a page."""
    return escape(printable(text))


def _bar(piece: Piece, whole: float, kind: str) -> str:
    left, width = 100 * piece[0] / whole, 100 * (piece[1] - piece[0]) / whole
    return f'<div class="bar {kind}" style="left:{left:.3f}%;width:{width:.3f}%"></div>'
