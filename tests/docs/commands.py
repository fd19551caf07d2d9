"""The commands in the fenced shell blocks of the documents."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
_BLOCK = re.compile(r"^ *```(?:sh|shell|bash)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A line of a shell block, without its comment."""

    document: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


@cache
def commands() -> tuple[Command, ...]:
    """Every command of every document, in the documents' order."""
    return tuple(_commands())


def _commands() -> Iterator[Command]:
    for path in DOCUMENTS:
        for block in _BLOCK.findall(path.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield Command(path.relative_to(ROOT).as_posix(), tuple(words))
