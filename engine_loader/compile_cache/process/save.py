"""A save: one new pack with what the local caches have and the store does not."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..key import CacheKey
from ..packs.elf import is_cut_short
from ..packs.key_packs import effective_files, read_packs
from ..packs.manifest import Frame, Manifest, PackedFile, unsafe_link, unsafe_path
from ..packs.pack import LARGEST_FILE_BYTES, Pack, write_pack
from ..packs.relocate import is_group_file
from ..packs.scan import LocalFile, open_unchanged
from ..space import mib
from ..stores.interface import Store
from ..trust import Trust
from .outcome import Outcome

FACTORS = "cache_key_factors.json"
_MOST_FACTORS_BYTES = 256 << 10


def save(
    store: Store,
    key: CacheKey,
    directories: Mapping[str, Path],
    files: Sequence[LocalFile],
    trust: Trust,
    *,
    factors: Mapping[str, Any] | None = None,
    damaged: Collection[tuple[str, int]] = frozenset(),
    threads: int,
    level: int,
    most_bytes: int,
) -> Outcome:
    """Bring those of ``files`` into the store that its packs of ``key`` do not hold as they are.

    Args:
        damaged: frames, each as (name of its pack, index), that are there, but cannot be restored.

    Raises:
        CacheOperationInterrupted: no room, or more than ``most_bytes``; nothing half-written is left.
        OSError: the store fails.
    """
    began = time.monotonic()
    outcome = Outcome("complete")
    packs = read_packs(store, key, trust, outcome.messages)
    new = []
    for file in not_in(packs, files, damaged):
        problem = _problem(file)
        if problem is None:
            new.append(file)
        else:
            outcome.messages.append(f"{file.local} {problem}")
    if not new:
        outcome.status = "complete" if packs else "nothing"
        return outcome
    store.make_room(
        min(sum(file.size for file in new) // 8, most_bytes)
    )  # they compress to a quarter or so; watched, too

    def describe(packed: tuple[PackedFile, ...], frames: tuple[Frame, ...]) -> Manifest:
        return Manifest(
            key=key,
            created=time.time(),
            files=packed,
            frames=frames,
            host=socket.gethostname(),
            roots={name: str(path) for name, path in directories.items()},
            factors=factors or {},
        )

    pack = write_pack(store, describe, key, new, trust, threads=threads, level=level, most_bytes=most_bytes)
    if pack is not None:
        outcome.status = "saved"
        outcome.files, outcome.bytes = len(pack.manifest.files), pack.manifest.content_bytes
        outcome.pack_bytes, outcome.packs = pack.stored.size, 1
    outcome.seconds = time.monotonic() - began
    return outcome


def _problem(file: LocalFile) -> str | None:
    """Why a file must not be saved."""
    if file.size >= LARGEST_FILE_BYTES:
        return f"has {mib(file.size)}, and packs hold no file of 4 GiB or more"
    with suppress(OSError):  # what is gone, or cannot be read, is left out when it is packed
        if not file.link and is_cut_short(file.local, file.size):
            return "is cut short, as a linker leaves it that was killed: it is not saved; delete it"
    return None


def not_in(
    packs: list[Pack], files: Iterable[LocalFile], damaged: Collection[tuple[str, int]] = frozenset()
) -> list[LocalFile]:
    """The files that no pack holds as they are now, but for its ``damaged`` frames. What could not be restored (an
    unsafe path or link) is left out.
    """
    known = effective_files(packs, damaged)
    new = []
    for file in files:
        if unsafe_path(file.path) or (file.link and unsafe_link(file.path, file.link)):
            continue
        found = known.get(file.path)
        if found is None or not _is_same(file, found[1]):
            new.append(file)
    return new


def _is_same(local: LocalFile, packed: PackedFile) -> bool:
    if local.link or packed.link:
        return local.link == packed.link
    if local.mtime_ns == packed.mtime_ns and (local.size == packed.size or is_group_file(local.path)):
        return True  # as it was restored: a group file's size depends on where it is
    if local.size != packed.size:
        return False
    try:
        with open(open_unchanged(local), "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == packed.sha256
    except OSError:
        return True  # it is gone: there is nothing to save


def factors_of(files: Iterable[LocalFile]) -> dict[str, Any]:
    """What the engine itself says of its keys, by path."""
    found: dict[str, Any] = {}
    for file in files:
        if os.path.basename(file.path) == FACTORS and file.size <= _MOST_FACTORS_BYTES:
            with suppress(OSError, ValueError), open(open_unchanged(file), "rb") as content:
                found[file.path] = json.load(content)
    return found
