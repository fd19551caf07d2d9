"""A save: one new pack with what the local caches have and the store does not."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..directories import depends_on
from ..host.groups import HostGroup
from ..key import CacheKey
from ..packs.elf import is_cut_short
from ..packs.key_packs import effective_files, for_this_host, read_packs
from ..packs.manifest import Frame, Manifest, PackedFile, unsafe_link, unsafe_path
from ..packs.pack import LARGEST_FILE_BYTES, Pack, write_pack
from ..packs.relocate import is_group_file
from ..packs.scan import LocalFile
from ..space import mib
from ..stores.interface import Store
from ..trust import Trust
from ..verdict.factors import without_secrets
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
    threads: int,
    level: int,
    most_bytes: int,
) -> Outcome:
    """Bring those of ``files`` into the store that its packs of ``key`` do not hold as they are.

    Raises:
        CacheOperationInterrupted: no room, or more than ``most_bytes``; nothing half-written is left.
        OSError: the store fails.
    """
    began = time.monotonic()
    outcome = Outcome("complete")
    packs = for_this_host(read_packs(store, key, trust, outcome.messages), key)
    new = []
    for file in not_in(packs, files):
        if os.path.basename(file.path) == FACTORS:
            continue  # the manifest has what may be stored of it
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
        marked, hosts = with_hosts(packed, key)
        return Manifest(
            key=key,
            created=time.time(),
            files=marked,
            frames=frames,
            host=socket.gethostname(),
            roots={name: str(path) for name, path in directories.items()},
            factors=factors or {},
            hosts=hosts,
        )

    pack = write_pack(store, describe, key, new, trust, threads=threads, level=level, most_bytes=most_bytes)
    if pack is not None:
        outcome.status = "saved"
        outcome.files, outcome.bytes = len(pack.manifest.files), pack.manifest.content_bytes
        outcome.pack_bytes, outcome.packs = pack.stored.size, 1
    outcome.seconds = time.monotonic() - began
    return outcome


def with_hosts(files: Iterable[PackedFile], key: CacheKey) -> tuple[tuple[PackedFile, ...], tuple[HostGroup, ...]]:
    """``files`` with the group of host facts that each depends on, and these groups."""
    hosts: list[HostGroup] = []
    marked = []
    for file in files:
        code = depends_on(file.path)
        group = None if code == "any" else key.host_groups.get(code)
        if group is not None and group not in hosts:
            hosts.append(group)
        marked.append(file if group is None else file._replace(host=hosts.index(group)))
    return tuple(marked), tuple(hosts)


def _problem(file: LocalFile) -> str | None:
    """Why a file must not be saved."""
    if file.size >= LARGEST_FILE_BYTES:
        return f"has {mib(file.size)}, and packs hold no file of 4 GiB or more"
    with suppress(OSError):  # what is gone, or cannot be read, is left out when it is packed
        if not file.link and is_cut_short(file.local, file.size):
            return "is cut short, as a linker leaves it that was killed: it is not saved; delete it"
    return None


def not_in(packs: list[Pack], files: Iterable[LocalFile]) -> list[LocalFile]:
    """The files that no pack holds as they are now. What could not be restored (an unsafe path or link) is left out."""
    known = effective_files(packs)
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
        with open(local.local, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == packed.sha256
    except OSError:
        return True  # it is gone: there is nothing to save


def factors_of(files: Iterable[LocalFile]) -> dict[str, Any]:
    """What the engine itself says of its keys, by path, without secrets: older engines write all variables there."""
    found: dict[str, Any] = {}
    for file in files:
        if os.path.basename(file.path) == FACTORS and file.size <= _MOST_FACTORS_BYTES:
            with suppress(OSError, ValueError):
                found[file.path] = without_secrets(json.loads(Path(file.local).read_bytes()))
    return found
