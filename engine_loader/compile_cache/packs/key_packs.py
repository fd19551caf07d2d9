"""The packs of one key together: which can be trusted, and which of their files count."""

from __future__ import annotations

from collections.abc import Collection

from ..cache_errors import CacheError
from ..key import CacheKey
from ..stores.interface import Store
from ..trust import Trust
from .manifest import PackedFile
from .pack import Pack, read_manifest


def read_packs(store: Store, key: CacheKey, trust: Trust, messages: list[str]) -> list[Pack]:
    """Every pack of the key that can be trusted, the newest first; a refusal is a message each.

    Raises:
        OSError: the store cannot be listed.
    """
    packs = []
    entries = list(store.entries(key.prefix))
    out = {entry.digest for entry in entries if entry.kind == "quarantined"}
    for stored in (entry for entry in entries if entry.kind == "pack" and entry.digest not in out):
        try:
            packs.append(read_manifest(store, stored, key.prefix, trust))
        except FileNotFoundError:
            continue  # pruned meanwhile
        except CacheError as error:
            messages.append(str(error))
        except OSError as error:
            messages.append(f"{store.description}/{stored.name}: could not be read: {error}")
    return sorted(packs, key=lambda pack: (pack.manifest.created, pack.stored.name), reverse=True)


def effective_files(
    packs: list[Pack], without: Collection[tuple[str, int]] = frozenset()
) -> dict[str, tuple[Pack, PackedFile]]:
    """Path -> the newest file of that path. A file that lies where another pack has a directory is left out.

    Args:
        without: frames, each as (name of its pack, index), that count as not there: older files of their paths count.
    """
    found: dict[str, tuple[Pack, PackedFile]] = {}
    above: set[str] = set()
    links: set[str] = set()
    for pack in packs:
        for file in pack.manifest.files:
            if (pack.stored.name, file.frame) in without:
                continue
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
