"""``engine-loader report``: where the time of an engine's start went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..console.output import console, print_json, printable, table

if TYPE_CHECKING:
    from ...report.reading.account import Account

_FEWEST_BAR_COLUMNS, _MOST_BAR_COLUMNS = 20, 60
_NAME_COLUMNS = 40
_SECONDS_COLUMNS = 9
_SHORTEST_SHOWN = 0.004  # of the whole


class _ShowsByDefault(TyperGroup):
    """`report` and `report DIR` are `report show latest` and `report show DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ShowsByDefault,
    help="Show where the time of an engine's start went, and compare starts.",
    rich_markup_mode="markdown",
)


@app.command()
def show(
    start: Annotated[
        str,
        typer.Argument(
            metavar="[latest|DIR]",
            help="The start: the last one, a directory of events, or the name of one in report.directory.",
        ),
    ] = "latest",
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a trace for https://ui.perfetto.dev instead.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page for a browser instead.")
    ] = None,
) -> None:
    """Show a start: its phases by process, what the time to ready depended on, and what would help most.

    **Examples**

    ```shell
    engine-loader report                      # the last start
    engine-loader report --html start.html
    engine-loader report compare A B --threshold 0.2
    ```
    """
    from ...report.reading.account import account_of
    from ...report.starts import find_start

    account = account_of(find_start(start, _directory()))
    if trace is not None:
        from ...report.reading.trace import trace_of

        trace.write_text(json.dumps(trace_of(account.timeline)))
    if html is not None:
        from ...report.reading.page import page_of

        html.write_text(page_of(account), encoding="utf-8")
    if as_json:
        print_json(account.to_json())
    elif trace is None and html is None:
        _print(account)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(metavar="A", help="The start that is compared with: as for `report`.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The start that is judged.")] = "latest",
    *,
    threshold: Annotated[
        float,
        typer.Option(min=0.0, help="The exit status is 1 if a phase, or the whole, takes longer by more than this."),
    ] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two starts phase by phase. Differences of less than 0.2 s do not count.

    **Example**

    ```shell
    engine-loader report compare 20261130T080000Z-1 latest --threshold 0.2 || echo slower
    ```
    """
    from ...report.reading.comparison import compare as compare_paths
    from ...report.reading.critical_path import critical_path
    from ...report.reading.timeline import read_timeline
    from ...report.starts import find_start

    paths = [critical_path(read_timeline(find_start(start, _directory()))) for start in (before, after)]
    found = compare_paths(*paths)
    slower = found.slower(threshold)
    if as_json:
        print_json(
            {
                "threshold": threshold,
                "phases": [
                    {
                        "phase": change.phase or "unknown",
                        "before_s": change.before,
                        "after_s": change.after,
                        "slower": change in slower,
                    }
                    for change in (found.whole, *found.phases)
                ],
            }
        )
    else:
        rows = [
            (
                change.phase or "unknown",
                f"{change.before:.1f} s",
                f"{change.after:.1f} s",
                f"{change.difference:+.1f} s",
                "slower" if change in slower else "",
            )
            for change in (found.whole, *found.phases)
        ]
        console().print(table(("phase", "before", "after", "difference", ""), rows, right=(1, 2, 3)))
    if slower:
        raise typer.Exit(1)


@app.command("list")
def list_starts() -> None:
    """List the starts that are kept, the oldest first."""
    from ...report.reading.timeline import read_timeline
    from ...report.starts import ReportError, starts_in

    rows = []
    for directory in starts_in(_directory()):
        try:
            timeline = read_timeline(directory)
        except ReportError:
            continue
        ready = f"{timeline.ready:.1f} s" if timeline.ready is not None else "not ready"
        rows.append((directory.name, ready, printable(timeline.title)))
    console().print(table(("start", "exec to ready", "what"), rows, right=(1,)))


def _directory() -> str:
    from ...settings import load_settings

    return load_settings().settings.report.directory


def _print(account: Account) -> None:
    from rich.text import Text

    from ...report.reading.critical_path import seconds_by_phase
    from ...report.reading.rows import rows_of

    out, timeline = console(), account.timeline
    ready = f"ready after {timeline.ready:.1f} s" if timeline.ready is not None else "did not become ready"
    out.print(Text(f"{printable(timeline.title) or 'start'} {timeline.name}: {ready}", "bold"), soft_wrap=True)
    room = out.width - _NAME_COLUMNS - _SECONDS_COLUMNS - 2
    columns = max(_FEWEST_BAR_COLUMNS, min(_MOST_BAR_COLUMNS, room))
    whole = max(timeline.end, 1e-9)
    for process in timeline.processes:
        rows = rows_of(timeline, process, shortest_s=_SHORTEST_SHOWN * whole)
        if not rows:
            continue
        out.print(Text(f"\n{printable(process.title)} (pid {process.pid}, {printable(process.node)})", "bold"))
        for row in rows:
            name = f"{'  ' * row.depth}{printable(row.title)}"[:_NAME_COLUMNS]
            style = "dim" if row.waits or row.beside else "cyan"
            bar = _bar(row.pieces, whole, columns, "─" if row.waits or row.beside else "━")
            out.print(Text.assemble(f"{name:<{_NAME_COLUMNS}}{row.seconds:>7.1f} s ", (bar, style)), soft_wrap=True)
    out.print(Text("\nthe time to ready", "bold"))
    for name, seconds in seconds_by_phase(account.path).items():
        if seconds >= _SHORTEST_SHOWN * whole:
            out.print(f"{name or 'unknown':<{_NAME_COLUMNS}}{seconds:>7.1f} s {seconds / whole:>5.0%}", soft_wrap=True)
    out.print(f"{account.coverage:.0%} of it is in known phases", soft_wrap=True)
    if timeline.stalls:
        out.print(Text("\nstalls", "bold"))
        for stall in timeline.stalls:
            said = f"- {printable(stall.process.title)}, after {stall.at:.0f} s: {printable(stall.text)}"
            out.print(Text(said, "yellow"), soft_wrap=True)
    if account.advice:
        out.print(Text("\nwhat would help most", "bold"))
        for one in account.advice:
            out.print(f"- {printable(one.text)}", soft_wrap=True)


def _bar(pieces: list[tuple[float, float]], whole: float, columns: int, mark: str) -> str:
    cells = [" "] * columns
    for began, ended in pieces:
        first = min(columns - 1, int(began / whole * columns))
        for cell in range(first, max(first + 1, min(columns, round(ended / whole * columns)))):
            cells[cell] = mark
    return "".join(cells).rstrip()
