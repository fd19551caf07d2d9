"""What the restores of the last start read of the compile cache's store, where that is a directory: kept as the list of
what it opened is (opened_last.py), and asked for by `engine-loader warm`.

As that list, it is a hint: of this user alone, and not believed where it names anything but objects of the store that
the settings name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....compile_cache.host.versions import NONE, module_version
from ....compile_cache.process.outcome import Outcome
from ....compile_cache.store_reads import Reads, joined_reads
from ....compile_cache.stores.object_names import kind_of
from ....home import home_expanded
from ....report.events import recorder
from ....settings import CompileCacheSettings, load_settings
from ....sources.registry import is_remote
from ....start.opened_files import MOST_FILES, believed_json, list_name, write_private

_ENGINES = ("vllm", "sglang")
_KINDS = {"marker", "denied", "index", "pack"}
_LIST = "restored"
_LISTS = f"{_LIST}-*.json"
_MOST_LISTS = 8  # interpreters and versions
_MOST_RANGES = 100_000
_LARGEST = 1 << 62
_here: Reads = {}
"""What restores for this process read. The first one of a start may restore before the start has a directory."""


def note_restored(outcome: Outcome, settings: CompileCacheSettings) -> None:
    """Leave what a restore has read in the directory of the start, for the process that keeps it. Raises nothing.

    Args:
        outcome: of a restore.
        settings: where that restored from.
    """
    if not outcome.reads or is_remote(settings.directory):
        return
    with suppress(OSError):  # there is no home, or the disk is full
        root = home_expanded(settings.directory).absolute()
        read = {f"{root}/{name}": ranges for name, ranges in outcome.reads.items() if kind_of(name) in _KINDS}
        _here.update(joined_reads(_here, read))
        if recorder.directory is not None:
            write_private(Path(recorder.directory, f"{_LIST}-{os.getpid()}.json"), json.dumps(_here))


def keep_restored(directory: Path, engine: str) -> None:
    """Keep what the restores of a start have read, to be called in its first process when it is ready; a start that
    restored nothing leaves what the one before it has kept.

    Args:
        directory: of the start; what the other processes have left there is taken up.
        engine: a module's name.

    Raises:
        OSError: the list cannot be written.
    """
    left = sorted(directory.glob(_LISTS))
    read = joined_reads(_here, *(found for path in left if (found := _checked(believed_json(path)))))
    for path in left:
        path.unlink(missing_ok=True)
    if not read:
        return
    root = directory.parent
    write_private(root / list_name(engine, module_version(engine), _LIST), json.dumps(read))
    for path in sorted(root.glob(_LISTS), key=lambda path: path.stat().st_mtime)[:-_MOST_LISTS]:
        path.unlink(missing_ok=True)


def restored_last(store: Path) -> Reads:
    """What the restores of the last starts of the installed engines read, with this interpreter, of the store in a
    directory; nothing where no list is there, or is believed: it must name objects of this store, and nothing else.

    Args:
        store: its absolute path.

    Returns:
        Name in the store -> (offset, size) in bytes, in the order in which they were read.
    """
    found: Reads = {}
    with suppress(OSError):  # there is no home
        root = home_expanded(load_settings().settings.report.directory)
        for engine in _ENGINES:
            version = module_version(engine)
            if version != NONE:
                listed = _checked(believed_json(root / list_name(engine, version, _LIST)))
                found = joined_reads(found, _in_store(listed, store))
    return found


def _in_store(listed: Reads, store: Path) -> Reads:
    """The names in the store of what is listed; nothing where anything else is."""
    above = f"{store}/"
    names = {path: path.removeprefix(above) for path in listed if path.startswith(above)}
    if len(names) < len(listed) or any(kind_of(name) not in _KINDS for name in names.values()):
        return {}
    return {names[path]: ranges for path, ranges in listed.items()}


def _checked(value: Any) -> Reads:
    """What a list holds; nothing where it holds anything but absolute paths with ranges of bytes."""
    if not isinstance(value, Mapping) or len(value) > MOST_FILES:
        return {}
    room = _MOST_RANGES
    for path, ranges in value.items():
        if not path.startswith("/") or "\0" in path or not isinstance(ranges, list):
            return {}
        room -= len(ranges)
        if room < 0 or not all(isinstance(one, list) and len(one) == 2 and all(map(_is_size, one)) for one in ranges):
            return {}
    return joined_reads(value)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST
