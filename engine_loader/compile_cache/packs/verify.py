"""Reads every byte of packs, and reports which are damaged, forged or not trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..cache_errors import CacheError, CacheValidationError
from ..stores.interface import Store, Stored
from ..trust import Trust
from .pack import read_frame, read_manifest


@dataclass(frozen=True)
class Verified:
    """A pack, and what is wrong with it (None: nothing)."""

    stored: Stored
    problem: str | None
    files: int = 0
    bytes: int = 0


def verify(store: Store, trust: Trust, prefix: str = "") -> Iterator[Verified]:
    """Every pack below ``prefix``, one after another."""
    for stored in store.list(prefix):
        try:
            pack = read_manifest(store, stored, stored.key_prefix, trust)
            location = f"{store.description}/{stored.name}"
            with store.open(stored.name) as file:
                for index, frame in enumerate(pack.manifest.frames):
                    content = read_frame(file, frame, location)
                    for member in (member for member in pack.manifest.files if member.frame == index):
                        head = member.head()
                        if content[member.offset : member.offset + len(head)] != head:
                            raise CacheValidationError(
                                f"{location}: the archive and the manifest differ at {member.path!r}"
                            )
            yield Verified(stored, None, len(pack.manifest.files), pack.manifest.content_bytes)
        except FileNotFoundError:
            continue  # pruned meanwhile
        except (OSError, CacheError) as error:
            yield Verified(stored, str(error))
