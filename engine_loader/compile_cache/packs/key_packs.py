"""The packs of one key together: which can be trusted, and which of their files count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..cache_errors import CacheError
from ..host.groups import HostGroup, HostGroups
from ..key import CacheKey
from ..stores.interface import Store
from ..trust import Trust
from .manifest import ANY_HOST, PackedFile
from .pack import Pack, read_manifest


def read_packs(store: Store, key: CacheKey, trust: Trust, messages: list[str]) -> list[Pack]:
    """Every pack of the key that can be trusted, the newest first; a refusal is a message each.

    Raises:
        OSError: the store cannot be listed.
    """
    packs = []
    for stored in store.list(key.prefix):
        try:
            packs.append(read_manifest(store, stored, key.prefix, trust))
        except FileNotFoundError:
            continue  # pruned meanwhile
        except CacheError as error:
            messages.append(str(error))
        except OSError as error:
            messages.append(f"{store.description}/{stored.name}: could not be read: {error}")
    return sorted(packs, key=lambda pack: (pack.manifest.created, pack.stored.name), reverse=True)


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


def for_each_host(packs: list[Pack]) -> Iterator[list[Pack]]:
    """``packs`` as one host after another sees them, without the files that hold on any host; then those alone."""
    for group in {group for pack in packs for group in pack.manifest.hosts}:
        indexes = [{i for i, other in enumerate(pack.manifest.hosts) if other == group} for pack in packs]
        yield [_only(pack, hosts) for pack, hosts in zip(packs, indexes, strict=True)]
    yield [_only(pack, {ANY_HOST}) for pack in packs]


def _only(pack: Pack, hosts: set[int]) -> Pack:
    files = tuple(file for file in pack.manifest.files if file.host in hosts)
    return replace(pack, manifest=replace(pack.manifest, files=files))


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


def effective_files(packs: list[Pack]) -> dict[str, tuple[Pack, PackedFile]]:
    """Path -> the newest file of that path. A file that lies where another pack has a directory is left out."""
    found: dict[str, tuple[Pack, PackedFile]] = {}
    above: set[str] = set()
    links: set[str] = set()
    for pack in packs:
        for file in pack.manifest.files:
            parents = _parents(file.path)
            if (
                file.path in found
                or file.path in above
                or any(parent in links or parent in found for parent in parents)
            ):
                continue
            found[file.path] = (pack, file)
            above.update(parents)
            if file.link:
                links.add(file.path)
    return found


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
