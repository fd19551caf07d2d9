"""Signs packs again with the key that signs now, so that an older key can be dropped without a miss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..cache_errors import CacheError
from ..stores.interface import Store, Stored
from ..trust import Trust
from .pack import Pack, finish_pack, read_compressed_frame, read_manifest


@dataclass(frozen=True)
class Resigned:
    """A pack that another key had signed, and why it could not be signed again (None: it was)."""

    name: str
    problem: str | None = None


def resign(store: Store, trust: Trust) -> Iterator[Resigned]:
    """Sign again every pack that another key has signed. What does not verify is passed over.

    Raises:
        CacheValidationError: this node cannot sign.
        OSError: the store cannot be listed.
    """
    trust.sign(b"")  # so that a node that cannot says so before it reads anything
    for stored in list(store.list()):
        try:
            pack = read_manifest(store, stored, stored.key_prefix, trust)
            if pack.by_signer:
                continue
            _write_again(store, pack, trust)
            yield Resigned(stored.name)
        except FileNotFoundError:
            continue  # pruned meanwhile
        except (CacheError, OSError) as error:
            yield Resigned(stored.name, str(error))


def _write_again(store: Store, pack: Pack, trust: Trust) -> None:
    made = _copy(store, pack, trust)
    if made.stored.name != pack.stored.name:
        store.delete(pack.stored.name)
    elif not read_manifest(store, made.stored, pack.stored.key_prefix, trust).by_signer:
        # The store keeps what is under a name already.
        _copy(store, pack, trust, delete=pack.stored)


def _copy(store: Store, pack: Pack, trust: Trust, *, delete: Stored | None = None) -> Pack:
    """Write a pack's frames with a new tail; ``delete`` goes just before that becomes visible."""
    location = f"{store.description}/{pack.stored.name}"
    position = 0
    with store.open(pack.stored.name) as source, store.upload(pack.stored.key_prefix) as upload:
        for frame in pack.manifest.frames:
            content = read_compressed_frame(source, frame, location)
            upload.write(content)
            position += len(content)
        if delete is not None:
            store.delete(delete.name)
        return finish_pack(upload, store, pack.manifest, position, trust)
