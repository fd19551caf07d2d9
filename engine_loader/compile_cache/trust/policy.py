"""How packs are signed, and which of them are taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..cache_errors import CacheValidationError
from .keys import read_key_file
from .places import check_above, check_private
from .signatures import KINDS, PLAIN, Block, HmacKey, Key, PlainDigest, make_block, signed_message, store_id

PACK = "pack"


class Trust:
    """How packs are signed and verified.

    Args:
        keys: all verify, and the first that can sign signs; or a secret for HMAC-SHA256. Empty: packs have a plain
            digest, which finds damage and no forgery.
        anyone: take packs that others could have written (only without keys).
        store: the name of the store. It is inside what is signed, so that a pack of one store is none of another's.
    """

    def __init__(self, keys: bytes | Sequence[Key] = (), *, anyone: bool = False, store: str = "") -> None:
        self.keys: tuple[Key, ...] = (HmacKey(keys),) if isinstance(keys, bytes) else tuple(keys)
        self.anyone = anyone
        self.store = store

    @property
    def signed(self) -> bool:
        """Whether only signed packs are taken."""
        return bool(self.keys)

    @property
    def can_sign(self) -> bool:
        """Whether packs can be written; False on a node that has public keys only."""
        return not self.keys or any(key.can_sign for key in self.keys)

    def sign(self, content: bytes, *, purpose: str = PACK) -> bytes:
        """The signature block over ``content``, at most ``signatures.MOST_BLOCK_BYTES``.

        Raises:
            CacheValidationError: this node has public keys only.
        """
        return make_block(self._signer(), content, self.store, purpose)

    def verify(self, content: bytes, block: bytes, location: str, *, purpose: str = PACK) -> None:
        """Raises CacheValidationError when ``block`` is none that ``sign`` makes with one of the keys."""
        if reason := self._problem(content, block, purpose):
            raise CacheValidationError(f"{location}: refused: {reason}")

    def for_store(self, name: str) -> Trust:
        """The trust for the store with this name."""
        return Trust(self.keys, anyone=self.anyone, store=name)

    def check_entry(self, path: Path, facts: os.stat_result | None = None) -> None:
        """Refuse a file or directory of a store that others may write, where only its owner vouches for it."""
        if not self.signed and not self.anyone:
            check_private(path, facts)

    def check_store(self, directory: Path) -> None:
        """Refuse the directory of a store that others may write or replace, where only its owner vouches for it."""
        if not self.signed and not self.anyone:
            check_private(directory)
            check_above(directory)

    def _signer(self) -> Key:
        if not self.keys:
            return PlainDigest()
        for key in self.keys:
            if key.can_sign:
                return key
        raise CacheValidationError(
            "this node has public keys only: it restores packs and cannot sign any; "
            "give compile_cache.key_file a signing key, or set compile_cache.read_only: true"
        )

    def _problem(self, content: bytes, block: bytes, purpose: str) -> str | None:
        try:
            parsed = Block.parse(block)
        except ValueError as error:
            return f"its signature is damaged: {error}"
        if not self.keys and parsed.kind != PLAIN:
            return "it was signed: set compile_cache.key_file (or public_keys) to the keys of its writers"
        if self.keys and parsed.kind == PLAIN:
            return "it was not signed"
        key = self._key_of(parsed)
        kind = KINDS.get(parsed.kind, "signature")
        if key is None:
            known = ", ".join(key.id.hex() for key in self.keys)
            which = f"its {kind} is by the key {parsed.key_id.hex()}, and this node knows {known}"
            return f"{which}: forged, damaged, or made with another key"
        if parsed.store_id != store_id(self.store):
            return "it was made for another store, or is damaged: packs are not copied between stores"
        message = signed_message(parsed.kind, parsed.key_id, content, self.store, purpose)
        if key.verify(message, parsed.signature):
            return None
        return f"its {kind} is wrong: forged or damaged" if self.keys else "its digest does not match: it is damaged"

    def _key_of(self, block: Block) -> Key | None:
        for key in self.keys or (PlainDigest(),):
            if (key.kind, key.id) == (block.kind, block.key_id):
                return key
        return None


def load_trust(key_file: str | None, *, anyone: bool = False) -> Trust:
    """Read the key file.

    Raises:
        CacheValidationError: it cannot be read, holds no usable key, or others may write it.
    """
    return Trust(read_key_file(key_file) if key_file else (), anyone=anyone)
