"""Output of the commands: texts, JSON, tables and progress bars."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...escaping import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "byte_progress_bar",
    "console",
    "count",
    "print_error",
    "print_json",
    "print_plain_table",
    "print_warning",
    "print_wrapped",
    "printable",
    "progress_bar",
    "table",
]

# rich folds lines at 80 columns if the output is not a terminal; with this width nothing is folded.
_PIPE_COLUMNS = 10_000


def console(*, stderr: bool = False) -> Console:
    """A console that prints texts unchanged: without markup, highlighting or emoji codes."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_COLUMNS
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def print_error(message: str) -> None:
    """Print a message in red on stderr; its line breaks stay."""
    print_wrapped(f"error: {printable(message, lines=True)}", "red", stderr=True)


def print_warning(message: str) -> None:
    """Print a message in yellow on stderr."""
    print_wrapped(f"warning: {printable(message)}", "yellow", stderr=True)


def print_wrapped(
    text: str, style: str = "", *, stderr: bool = False, indent: str = "", parts: Mapping[str, str] | None = None
) -> None:
    """Print a text; on a terminal, lines end between words.

    A word that is longer than a line, as a path can be, stays whole: the terminal goes on with it in the next line, and
    whoever copies it gets no blanks.

    Args:
        text: whose line breaks stay.
        style: of rich.
        stderr: print it there.
        indent: of all lines but the first of each of the text's lines.
        parts: words of the text -> their own style, where they first stand.
    """
    from rich.text import Text

    out = console(stderr=stderr)
    if out.is_terminal:
        text = "\n".join(_wrapped(line, out.width, indent) for line in text.split("\n"))
    shown = Text(text, style)
    for part, own in (parts or {}).items():
        begin = text.find(part)
        if begin >= 0:
            shown.stylize(own, begin, begin + len(part))
    out.print(shown, soft_wrap=True)


def _wrapped(line: str, width: int, indent: str) -> str:
    lines = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    # ASCII only: a file's name may hold bytes that are not text.
    print(json.dumps(value, indent=2))


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], right: Iterable[int] = (1, 2)) -> Table:
    """A table with a heading for each column; ``right``: the numbers of the columns that are aligned to the right."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    aligned = set(right)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number in aligned else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` steps on stderr. Yields a function to call with the name of each step that begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    out = console(stderr=True)
    # A thread that refreshes the bar would take CPU time from the measurement.
    with Progress(*columns, console=out, auto_refresh=False, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def begin(step: str) -> None:
            bar.update(task, description=step, advance=1, refresh=True)

        yield begin


@contextmanager
def byte_progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr. Yields a function that takes (bytes done, bytes in all)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    out = console(stderr=True)
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of texts from outside, each as ``printable`` has it.

    Every text is whole, in a narrow terminal, too: a digest that is cut or broken cannot be given to another command.
    Where the output is no terminal, a tab stands between two columns, as ``cut`` takes it.
    """
    from rich.text import Text

    out = console()
    lines = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    if not out.is_terminal:
        for line in lines:
            print("\t".join(line))  # rich would put blanks in place of tabs
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        out.print(Text("  ".join(cells).rstrip(), "" if number else "bold"), soft_wrap=True)


def count(number: int, noun: str) -> str:
    """``1 pack``, ``1,200 packs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
