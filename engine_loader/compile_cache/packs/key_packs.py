"""The packs of one key together: which can be trusted, and which of their files count."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..cache_errors import CacheError, CacheValidationError
from ..host.groups import HostGroup, HostGroups
from ..key import CacheKey
from ..stores.interface import Store, Stored
from ..stores.object_names import INDEX
from ..trust import Trust
from .index import Ends, encode, read_ends
from .manifest import ANY_HOST, PackedFile
from .pack import EndReader, Pack, read_manifest, verified_pack

MOST_SINGLY = 16
"""Packs that an index lacks and that are read one by one, the newest first."""
MOST_FOR_AN_INDEX = 1024
_THREADS = 8
_MOST_LISTS = 5


class Refusal(NamedTuple):
    """A pack that is not trusted or cannot be read.

    Attributes:
        is_signed: a key of this node has signed it.
    """

    stored: Stored
    reason: str
    is_signed: bool = False


@dataclass
class KeyPacks:
    """What a store has of a key.

    Attributes:
        packs: that are trusted, the newest first.
        entries: all objects of the key, as they were listed.
        refused: packs that are not trusted or cannot be read, with the reason.
        unread: digests of packs that were not looked at, for there are too many.
        unreadable: directories that could not be looked into, with the reason.
        quarantined: digests of packs that a person or a check took out of use.
    """

    packs: list[Pack] = field(default_factory=list)
    entries: list[Stored] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    quarantined: set[str] = field(default_factory=set)

    @property
    def taken(self) -> set[str]:
        """Digests that name something else than a trusted pack."""
        return {one.stored.digest for one in self.refused} | set(self.unread) | self.quarantined

    def messages(self) -> list[str]:
        """One line about everything that was passed over."""
        lines = [one.reason for one in self.refused] + [f"{what}: cannot be read" for what in self.unreadable]
        if self.unread:
            lines.append(f"{len(self.unread)} packs are not in the key's index, and too many to be read one by one")
        if not lines:
            return []
        more = f" (and {len(lines) - 1} more, see `engine-loader compile-cache verify`)" if len(lines) > 1 else ""
        return [f"{lines[0]}{more}"]


def read_key(
    store: Store,
    prefix: str,
    trust: Trust,
    *,
    known: Iterable[Pack] = (),
    entries: list[Stored] | None = None,
    most_singly: int = MOST_SINGLY,
) -> KeyPacks:
    """What a store has of the key with ``prefix``: one listing, its index, and the packs that the index lacks.

    Args:
        known: packs that were read or written before by this process; they are neither read nor verified again.
        entries: of the key, where they were listed already.

    Raises:
        CacheValidationError: the store has no marker, or is not trusted.
        OSError: the store cannot be listed.
    """
    if not store.name:
        return KeyPacks()
    found = KeyPacks(entries=store.entries(prefix) if entries is None else entries)
    found.unreadable = list(store.unreadable)
    found.quarantined = {entry.digest for entry in found.entries if entry.kind == "quarantined"}
    listed = [entry for entry in found.entries if entry.kind == "pack" and entry.digest not in found.quarantined]
    verified = {_id(pack.stored): pack for pack in known if pack.tail}
    ends: Ends = {}
    if any(_id(stored) not in verified for stored in listed):
        ends = read_ends(store, found.entries, prefix)
    singly = []
    for stored in listed:
        if (pack := verified.get(_id(stored))) is not None:
            found.packs.append(replace(pack, stored=stored))
            continue
        if (end := ends.get(_id(stored))) is None or not _add(found, store, stored, prefix, trust, end):
            singly.append(stored)
    singly.sort(key=lambda stored: stored.modified, reverse=True)
    found.unread += [stored.digest for stored in singly[most_singly:]]
    _read_singly(found, store, singly[:most_singly], prefix, trust)
    gone = replaced_by(found.packs)
    # A compaction is as old as the newest pack that it replaces, and goes before it.
    found.packs.sort(
        key=lambda pack: (pack.manifest.created, pack.stored.digest not in gone, pack.stored.name), reverse=True
    )
    return found


def read_packs(store: Store, key: CacheKey, trust: Trust, messages: list[str]) -> list[Pack]:
    """Every pack of the key that can be trusted, the newest first. What was passed over is one message, and so is a
    store that is refused.

    Raises:
        OSError: the store cannot be listed.
    """
    try:
        found = read_key(store, key.prefix, trust)
    except CacheValidationError as error:
        messages.append(str(error))
        return []
    messages += found.messages()
    return found.packs


def update_index(store: Store, prefix: str, trust: Trust, known: Iterable[Pack] = ()) -> KeyPacks:
    """Replace the index of a key by one of all its packs, again until no other process has changed the key meanwhile;
    what the key has then.

    Raises:
        OSError: the store fails.
    """
    for _ in range(_MOST_LISTS):
        found = read_key(store, prefix, trust, known=known, most_singly=MOST_FOR_AN_INDEX)
        known = found.packs
        name = f"{prefix}/{INDEX}"
        if found.packs:
            store.replace(name, encode(found.packs))
        else:
            store.delete(name)
        if _listed(store.entries(prefix)) == _listed(found.entries):
            break
    return found


def replaced_by(packs: Iterable[Pack]) -> set[str]:
    """Digests of the packs that compactions among ``packs`` replace."""
    return {name for pack in packs for name in pack.manifest.replaces}


def living(packs: list[Pack]) -> list[Pack]:
    """The packs that no compaction among them replaces."""
    gone = replaced_by(packs)
    return [pack for pack in packs if pack.stored.digest not in gone]


def for_this_host(packs: list[Pack], key: CacheKey) -> list[Pack]:
    """``packs`` with those files only that hold on any host, or depend on facts that this host shares.

    All that looks for files by path must see these: another host's file of a path is not this one's.
    """
    if not any(pack.manifest.hosts for pack in packs):
        return packs
    here = {group.hash for group in key.host_groups.values()}
    return [_restricted(pack, here) for pack in packs]


def _restricted(pack: Pack, here: set[str]) -> Pack:
    manifest = pack.manifest
    usable = {ANY_HOST, *(index for index, group in enumerate(manifest.hosts) if group.hash in here)}
    return replace(pack, manifest=replace(manifest, files=tuple(f for f in manifest.files if f.host in usable)))


def of_other_hosts(packs: list[Pack], groups: HostGroups) -> tuple[int, HostGroup | None]:
    """How many files of ``packs`` depend on other hosts' facts, and a group of such facts, of the newest pack."""
    here = {group.hash for group in groups.values()}
    count, example = 0, None
    for pack in packs:
        for file in pack.manifest.files:
            if file.host >= 0 and pack.manifest.hosts[file.host].hash not in here:
                count += 1
                example = example or pack.manifest.hosts[file.host]
    return count, example


def effective_files(
    packs: Iterable[Pack], without: Collection[tuple[str, int]] = frozenset()
) -> dict[tuple[str, str], tuple[Pack, PackedFile]]:
    """(path, host group's hash or "") -> the newest file of that path for that host. A file that lies where another
    pack has a directory is left out.

    Args:
        without: frames, each as (name of its pack, index), that count as not there: older files of their paths count.
    """
    found: dict[tuple[str, str], tuple[Pack, PackedFile]] = {}
    paths: set[str] = set()
    above: set[str] = set()
    known: dict[str, list[str]] = {}  # most files share their directories
    for pack in packs:
        for file in pack.manifest.files:
            if without and (pack.stored.name, file.frame) in without:
                continue
            path = file.path
            name = (path, pack.manifest.host_of(file))
            directory = path.rpartition("/")[0]
            if (parents := known.get(directory)) is None:
                parents = known[directory] = _parents(path)
            if name in found or path in above or not paths.isdisjoint(parents):
                continue
            found[name] = (pack, file)
            paths.add(path)
            above.update(parents)
    return found


def files_for(
    packs: Iterable[Pack], host: str | None = None, without: Collection[tuple[str, int]] = frozenset()
) -> dict[str, tuple[Pack, PackedFile]]:
    """Path -> the file that a restore takes: that of a host group where there is one, else that for any host.

    Args:
        host: hash of the group; None: any that ``packs`` have, of which ``for_this_host`` left none but this host's.
        without: as in ``effective_files``.
    """
    for_any: dict[str, tuple[Pack, PackedFile]] = {}
    own: dict[str, tuple[Pack, PackedFile]] = {}
    for (path, group), item in effective_files(packs, without).items():
        if not group:
            for_any[path] = item
        elif host in (None, group):
            own.setdefault(path, item)
    return for_any | own


def _read_singly(found: KeyPacks, store: Store, listed: list[Stored], prefix: str, trust: Trust) -> None:
    def read(stored: Stored) -> Pack | Refusal | None:
        try:
            return read_manifest(store, stored, prefix, trust)
        except FileNotFoundError:
            return None  # pruned meanwhile
        except CacheValidationError as error:
            return Refusal(stored, str(error), error.is_signed)
        except CacheError as error:
            return Refusal(stored, str(error))
        except OSError as error:
            return Refusal(stored, f"{store.description}/{stored.name}: could not be read: {error}")

    if not listed:
        return
    with ThreadPoolExecutor(min(_THREADS, len(listed)), thread_name_prefix="compile-cache") as pool:
        for result in pool.map(read, listed):
            if isinstance(result, Pack):
                found.packs.append(result)
            elif result is not None:
                found.refused.append(result)


def _add(found: KeyPacks, store: Store, stored: Stored, prefix: str, trust: Trust, end: bytes) -> bool:
    """Whether what the index has of a pack is the end of one that is trusted."""
    try:
        store.vouch(stored)
        found.packs.append(verified_pack(store, EndReader(stored, end), stored, prefix, trust))
    except (OSError, CacheError):
        return False
    return True


def _id(stored: Stored) -> tuple[str, int, str]:
    return stored.digest, stored.size, stored.version


def _listed(entries: Iterable[Stored]) -> set[tuple[str, int]]:
    return {(entry.name, entry.size) for entry in entries if entry.kind in ("pack", "quarantined")}


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
