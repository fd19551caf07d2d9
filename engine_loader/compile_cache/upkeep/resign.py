"""Signs packs again with the key that signs now, so that an older key can be dropped without a miss.

What is under a pack's name never changes. So a pack that is signed again gets the name of its next generation, and the
older one is deleted when the new one is there: a crash in between leaves both, and loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..cache_errors import CacheError
from ..packs.key_packs import MOST_FOR_AN_INDEX, KeyPacks, read_key, replaced_by, update_index
from ..packs.pack import Pack, finish_pack, read_compressed
from ..retention import GRACE_S
from ..stores.interface import Store
from ..stores.object_names import SUSPECT
from ..trust import Trust

_MOST_NOTE_BYTES = 1 << 16


@dataclass(frozen=True)
class Resigned:
    """A pack that another key had signed, and why it could not be signed again (None: it was)."""

    name: str
    problem: str | None = None


def resign(store: Store, trust: Trust) -> Iterator[Resigned]:
    """Sign again every pack that another key has signed. What does not verify, or is quarantined, stays as it is.

    Raises:
        CacheValidationError: this node cannot sign.
        OSError: the store cannot be listed.
    """
    trust.sign(b"")  # so that a node that cannot says so before it reads anything
    for prefix in sorted({stored.key_prefix for stored in store.list()}):
        found = read_key(store, prefix, trust, most_singly=MOST_FOR_AN_INDEX)
        for one in found.refused:
            yield Resigned(one.stored.name, one.reason)
        done = [_sign_again(store, found, pack, trust) for pack in found.packs if not pack.by_signer]
        yield from done
        if done:
            update_index(store, prefix, trust, found.packs)


def _sign_again(store: Store, found: KeyPacks, pack: Pack, trust: Trust) -> Resigned:
    replaced = pack.stored.digest in replaced_by(found.packs)
    try:
        if not replaced or store.now() - pack.stored.modified <= GRACE_S:
            made = _copy(store, found, pack, trust)
            _rename_suspicion(store, pack, made)
        # What a compaction has replaced for long is deleted, as pruning would: it no longer verifies without its key.
        store.delete(pack.stored.name)
    except (CacheError, OSError) as error:
        return Resigned(pack.stored.name, str(error))
    return Resigned(pack.stored.name)


def _copy(store: Store, found: KeyPacks, pack: Pack, trust: Trust) -> Pack:
    """Write a pack's frames with a new tail, under another name."""
    location = f"{store.description}/{pack.stored.name}"
    avoid = found.taken | {other.stored.digest for other in found.packs if not other.by_signer}
    with store.open(pack.stored.name) as source, store.upload(pack.stored.key_prefix) as upload:
        source.expect([(frame.offset, frame.size) for frame in pack.manifest.frames])
        for frame in pack.manifest.frames:
            upload.write(read_compressed(source, frame, location))
        return finish_pack(upload, store, pack.manifest, trust, avoid)


def _rename_suspicion(store: Store, old: Pack, new: Pack) -> None:
    """The note that a crash followed the pack, under the pack's new name."""
    prefix = old.stored.key_prefix
    name = f"{prefix}/{SUSPECT}{old.stored.digest}"
    try:
        note = store.read(name, _MOST_NOTE_BYTES)
    except FileNotFoundError:
        return
    store.create(f"{prefix}/{SUSPECT}{new.stored.digest}", note.content)
    store.delete(name)
