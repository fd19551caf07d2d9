"""Text from outside (names of files, values in packs, a server's answers) as it may stand in a log or a terminal."""

from __future__ import annotations


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with line breaks, escape sequences and all else that is not printable escaped.

    Whoever chooses a name could otherwise write lines of their own into a log, or control a terminal.

    Args:
        text: what is to be shown.
        lines: True leaves line feeds as they are.
    """
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )
