"""Packs that are taken out of use, by a person or by a repair: they stay where they are, with a note beside them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable

from ..cache_errors import CacheError
from ..compaction import salvage
from ..packs.pack import read_manifest
from ..packs.verify import Verified
from ..stores.interface import Store, Stored
from ..stores.object_names import QUARANTINED, SUFFIX
from ..trust import Trust


def find_pack(store: Store, name: str) -> Stored:
    """The pack with this name, or whose content hash begins so.

    Raises:
        CacheError: there is none, or more than one.
        OSError: the store cannot be listed.
    """
    wanted = name.removesuffix(SUFFIX)
    found = [one for one in store.list() if wanted == one.name.removesuffix(SUFFIX) or one.digest.startswith(wanted)]
    if len(found) != 1 or not wanted:
        count = len(found) if wanted else 0
        raise CacheError(
            f"{store.description} has {count} packs {name!r}: `engine-loader compile-cache verify` names all"
        )
    return found[0]


def quarantine(store: Store, pack: Stored, why: str) -> bool:
    """Take a pack out of use: restores, saves and compactions pass it over; False where it was already.

    Raises:
        OSError: the store cannot be written to.
    """
    note = {"host": socket.gethostname(), "when": time.time(), "why": why}
    return store.create(_note(pack), json.dumps(note).encode())


def release(store: Store, pack: Stored) -> None:
    """Take a pack into use again.

    Raises:
        OSError: the store cannot be written to.
    """
    store.delete(_note(pack))


def _note(pack: Stored) -> str:
    return f"{pack.key_prefix}/{QUARANTINED}{pack.digest}"


def repair(store: Store, trust: Trust, found: Iterable[Verified], *, level: int) -> list[tuple[Stored, str]]:
    """Save what is sound in packs with damaged frames, and take those packs out of use.

    Packs that are not trusted stay as they are: it may be this machine's key file that is wrong.

    Returns:
        what was done with a pack, a line each.

    Raises:
        CacheOperationInterrupted: no room.
        OSError: the store cannot be read or written to.
    """
    done: list[tuple[Stored, str]] = []
    for one in found:
        if one.damaged and not one.quarantined:
            pack = read_manifest(store, one.stored, one.stored.key_prefix, trust)
            made = salvage(store, pack, trust, level=level)
            quarantine(store, one.stored, one.problem or "")
            kept = f"what is sound of it is in {made.stored.name}" if made else "nothing of it is sound"
            done.append((one.stored, f"out of use; {kept}"))
    return done
