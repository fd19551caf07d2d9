"""What a start opened of shared libraries (.so) and compiled modules (.pyc): noted when it is ready, and read into the
page cache before the next one, in sequence, where an import would fetch it page by page.

A list is a hint and nothing more: of this user alone, for one interpreter and engine, and what it names is read and
thrown away. What cannot be noted, believed or read is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_FILES = 20_000
MOST_LIST_BYTES = 8 << 20
_MOST_PROCESSES = 200
_KINDS = re.compile(r"/.*\.(?:pyc|so(?:\.[0-9.]+)?)", re.DOTALL)
_PLACES = ("/site-packages/", "/dist-packages/")


def list_name(engine: str, version: str, kind: str = "opened") -> str:
    """The name of the list of an engine with this interpreter.

    Args:
        engine: the engine's name.
        version: its version.
        kind: of list.
    """
    parts = (sys.executable, sys.version, sys.prefix, engine, version)
    return f"{kind}-{engine}-{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:16]}.json"


def opened_here(modules: Mapping[str, Any] | None = None) -> list[str]:
    """The .pyc and .so files of this process's modules, in the order in which they were imported, with the other
    shared libraries that are mapped here, or in a process below, before the modules of the package that brings them.

    Args:
        modules: in place of ``sys.modules``.
    """
    found = list(filter(None, map(_file_of, list((sys.modules if modules is None else modules).values()))))
    known = set(found)
    first_of: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for pid in _below(os.getpid()) for path in _mapped(pid)):
        if path not in known:
            first_of.setdefault(_package(path), []).append(path)
    ordered: list[str] = []
    for path in found:
        ordered += [*first_of.pop(_package(path), ()), path]
    rest = [path for paths in first_of.values() for path in paths]
    return list(dict.fromkeys([*rest, *ordered]))[:MOST_FILES]


def write_list(path: Path, files: Iterable[str]) -> None:
    """Write a list in the place of another, for this user alone. What it cannot hold is left out.

    Raises:
        OSError: it cannot be written.
    """
    kept: list[str] = []
    room = MOST_LIST_BYTES - 2
    for file in files:
        room -= len(json.dumps(file)) + 2
        if room < 0 or len(kept) >= MOST_FILES:
            break
        kept.append(file)
    write_private(path, json.dumps(kept))


def write_private(path: Path, text: str) -> None:
    """Write a file in the place of another, for this user alone.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):  # of a process that was killed, and had this number
        beside.unlink()
    try:
        with open(
            os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w"
        ) as out:
            out.write(text)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def read_list(path: Path) -> list[str]:
    """The files of a list; none where there is none, it is not believed (``believed_json``), or it has anything in it
    but paths of .so and .pyc files.
    """
    found = believed_json(path)
    if not isinstance(found, list) or len(found) > MOST_FILES:
        return []
    return found if all(isinstance(one, str) and "\0" not in one and _KINDS.fullmatch(one) for one in found) else []


def believed_json(path: Path) -> Any:
    """What a list holds; None where there is no list, or it is not believed: another user's, one that others may write,
    no plain file, too large, or no JSON.
    """
    try:
        content = _believed(path)
    except OSError:
        return None
    try:
        return json.loads(content) if len(content) <= MOST_LIST_BYTES else None
    except (ValueError, RecursionError):
        return None


def _believed(path: Path) -> bytes:
    """The content of a list, at most a byte more than one may have; nothing where it is not this user's alone.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            return b""
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MOST_LIST_BYTES + 1)
    finally:
        os.close(descriptor)


def note_opened(directory: Path) -> None:
    """Leave what this process has opened in the directory of its start, for the process that sums it up.

    Raises:
        OSError: it cannot be written.
    """
    write_list(directory / f"opened-{os.getpid()}.json", opened_here())


def noted(directory: Path) -> list[str]:
    """What the processes of a start have left in its directory, each file once."""
    lists = map(read_list, sorted(directory.glob("opened-*.json")))
    return list(dict.fromkeys(path for paths in lists for path in paths))


def _file_of(module: object) -> str | None:
    """The .pyc of a module, or the .so; None: it has neither. Asks no module for a name that it may make up."""
    try:
        names = vars(module)
        spec = names.get("__spec__")
        for path in (names.get("__cached__"), getattr(spec, "cached", None), names.get("__file__")):
            if isinstance(path, str) and _KINDS.fullmatch(path) and os.path.isfile(path):
                return path
    except Exception:  # what modules hold in place of themselves may raise anything
        return None
    return None


def _package(path: str) -> str:
    """What a file belongs to: "torch" of …/site-packages/torch/lib/libtorch.so; else its directory."""
    for place in _PLACES:
        _, found, rest = path.rpartition(place)
        if found:
            return rest.partition("/")[0].removesuffix(".libs")
    return os.path.dirname(path)


def _mapped(pid: int) -> Iterator[str]:
    """The shared libraries that a process of this user has mapped."""
    with suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            path = f"/{line.rstrip(chr(10)).partition('/')[2]}"
            if ".so" in path and _KINDS.fullmatch(path):
                yield path


def _below(pid: int) -> list[int]:
    """A process, and those below it."""
    found = [pid]
    for one in found:
        if len(found) >= _MOST_PROCESSES:
            break
        with suppress(OSError):
            for task in os.listdir(f"/proc/{one}/task"):
                with suppress(OSError), open(f"/proc/{one}/task/{task}/children") as children:
                    found += map(int, children.read().split())
    return found
