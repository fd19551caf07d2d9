"""Which files the local caches hold."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..directories import CacheRoot


class LocalFile(NamedTuple):
    """A file of a local cache.

    Attributes:
        path: as in packs, "<root>/<path below it>".
        local: where it is.
        ctime_ns: when it was put there, which its mtime need not say.
        link: the target if it is a symbolic link, else empty.
    """

    path: str
    local: str
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    link: str = ""


def scan(roots: Iterable[CacheRoot], directories: Mapping[str, Path]) -> list[LocalFile]:
    """All files that may be packed, sorted by path. Files that are deleted meanwhile are left out."""
    found: list[LocalFile] = []
    for root in roots:
        if root.name in directories:
            found += _below(root, directories[root.name], "")
    return sorted(found)


def _below(root: CacheRoot, directory: Path, relative: str) -> Iterator[LocalFile]:
    try:
        entries = list(os.scandir(os.path.join(directory, relative)))
    except OSError:
        return
    for entry in entries:
        path = f"{relative}{entry.name}"
        with suppress(OSError):
            facts = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(facts.st_mode):
                yield from _below(root, directory, f"{path}/")
            elif root.takes(path) and (stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode)):
                link = os.readlink(entry.path) if stat.S_ISLNK(facts.st_mode) else ""
                yield LocalFile(
                    f"{root.name}/{path}",
                    entry.path,
                    0 if link else facts.st_size,
                    facts.st_mtime_ns,
                    facts.st_ctime_ns,
                    stat.S_IMODE(facts.st_mode) & 0o777,
                    link,
                )
