"""How the commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Where the output is not a terminal, nothing is folded; rich would at 80 columns.
_PIPE_COLUMNS = 10_000


def console(*, stderr: bool = False) -> Console:
    """A console that shows texts as they are: no markup, no guessed colours."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_COLUMNS
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def print_error(message: str) -> None:
    """A message in red on stderr, its lines as they are."""
    from rich.text import Text

    console(stderr=True).print(Text(f"error: {printable(message, lines=True)}", "red"), soft_wrap=True)


def print_warning(message: str) -> None:
    """A message in yellow on stderr."""
    from rich.text import Text

    console(stderr=True).print(Text(f"warning: {printable(message)}", "yellow"), soft_wrap=True)


def print_json(value: Any) -> None:
    """A value as JSON on stdout, for a program or for eyes."""
    # ASCII only: a file's name may hold bytes that are not text.
    print(json.dumps(value, indent=2))


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with everything escaped that a terminal would obey or cannot show; names in files come from outside."""
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr of ``total`` steps; call what it yields with the name of every step as it begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    out = console(stderr=True)
    # Not refreshed by a thread: it would take its time from what is being measured.
    with Progress(*columns, console=out, auto_refresh=False, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def begin(step: str) -> None:
            bar.update(task, description=step, advance=1, refresh=True)

        yield begin


@contextmanager
def byte_progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; call what it yields with (bytes done, bytes in all)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    out = console(stderr=True)
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
