"""Notes in a store about packs whose restore was followed by a crash, so that other nodes are warned."""

from __future__ import annotations

import json
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress

from ..cache_errors import CacheError
from ..packs.pack import Pack
from ..stores.interface import Store, Stored
from ..stores.object_names import SUFFIX, SUSPECT

_MOST_NOTE_BYTES = 4096
_MOST_SHOWN_CHARS = 64


def note_suspects(store: Store, packs: Iterable[str]) -> None:
    """Note packs, by their names in the store.

    Raises:
        OSError: the store cannot be written to.
    """
    text = json.dumps({"host": socket.gethostname()}).encode()
    for name in packs:
        prefix, _, base = name.rpartition("/")
        store.create(f"{prefix}/{SUSPECT}{base.removesuffix(SUFFIX)}", text)


def suspects(store: Store, entries: Iterable[Stored], packs: Collection[Pack]) -> list[str]:
    """A line for each of ``packs`` that was noted.

    Args:
        entries: everything that the store has of the key.
    """
    used = {pack.stored.digest: pack.stored.name for pack in packs}
    lines = []
    for entry in entries:
        if entry.kind == "suspect" and entry.digest in used:
            lines.append(
                f"{store.description}/{used[entry.digest]}: an engine on {_host(store, entry)} ended before it was "
                "ready after a restore of it; should this one end, too: "
                f"`engine-loader compile-cache quarantine {entry.digest[:12]}`"
            )
    return lines


def clear_suspects(store: Store, entries: Iterable[Stored], packs: Collection[Pack]) -> None:
    """Delete the notes about ``packs``: they have served.

    Raises:
        OSError: the store cannot be written to.
    """
    used = {pack.stored.digest for pack in packs}
    for entry in entries:
        if entry.kind == "suspect" and entry.digest in used:
            store.delete(entry.name)


def _host(store: Store, entry: Stored) -> str:
    with suppress(OSError, CacheError, ValueError, KeyError, TypeError):
        host = str(json.loads(store.read(entry.name, _MOST_NOTE_BYTES).content)["host"])
        return "".join(filter(str.isprintable, host))[:_MOST_SHOWN_CHARS]
    return "some node"
