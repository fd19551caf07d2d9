"""What stands behind signed content: the signature block, and the keys that make and check its signature.

    kind (1 byte) | key id (8) | store id (8) | signature (32 or 64)

The signature is over the block's head, the name of the store, what the content is for, and the SHA-256 of the content.
A new kind of key is a class like ``HmacKey`` and a line in ``keys.parse_key``.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from typing import Protocol

PLAIN, HMAC, ED25519 = 0, 1, 2
KINDS = {PLAIN: "plain digest", HMAC: "HMAC", ED25519: "Ed25519"}
MOST_BLOCK_BYTES = 128
"""No signature block is larger; readers may refuse what says so before they read it."""
_HEAD = struct.Struct("<B8s8s")
_DOMAIN = b"engine_loader compile cache 2\0"


class Key(Protocol):
    """A key that checks signatures, and makes them when ``can_sign``."""

    @property
    def kind(self) -> int:
        """One of ``KINDS``."""

    @property
    def id(self) -> bytes:
        """8 bytes that tell keys apart. Those of a signing key and its public key are equal."""

    @property
    def can_sign(self) -> bool:
        """Whether ``sign`` may be called."""

    def sign(self, message: bytes) -> bytes:
        """The signature over ``message``."""

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether ``signature`` was made over ``message`` by this key."""


@dataclass(frozen=True)
class PlainDigest:
    """No key: a SHA-256 that finds damage and no forgery."""

    kind = PLAIN
    id = bytes(8)
    can_sign = True

    def sign(self, message: bytes) -> bytes:
        return hashlib.sha256(message).digest()

    def verify(self, message: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(self.sign(message), signature)


@dataclass(frozen=True)
class HmacKey:
    """HMAC-SHA256: who can check a signature can make one."""

    secret: bytes = field(repr=False)
    kind = HMAC
    can_sign = True

    @property
    def id(self) -> bytes:
        return hmac.digest(self.secret, b"engine_loader key id", "sha256")[:8]

    def sign(self, message: bytes) -> bytes:
        return hmac.digest(self.secret, message, "sha256")

    def verify(self, message: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(self.sign(message), signature)


@dataclass(frozen=True)
class Block:
    """A signature block, taken apart."""

    kind: int
    key_id: bytes
    store_id: bytes
    signature: bytes

    @classmethod
    def parse(cls, block: bytes) -> Block:
        """Take a block apart.

        Raises:
            ValueError: it is too short or too long.
        """
        if not _HEAD.size < len(block) <= MOST_BLOCK_BYTES:
            raise ValueError(f"a signature block of {len(block)} bytes")
        kind, key_id, store = _HEAD.unpack(block[: _HEAD.size])
        return cls(kind, key_id, store, block[_HEAD.size :])

    def to_bytes(self) -> bytes:
        return _HEAD.pack(self.kind, self.key_id, self.store_id) + self.signature


def make_block(key: Key, content: bytes, store: str, purpose: str) -> bytes:
    """The signature block over ``content``, which is for ``purpose`` in the store with the name ``store``."""
    signature = key.sign(signed_message(key.kind, key.id, content, store, purpose))
    return Block(key.kind, key.id, store_id(store), signature).to_bytes()


def signed_message(kind: int, key_id: bytes, content: bytes, store: str, purpose: str) -> bytes:
    """What a signature is made over. It differs wherever any of the values differs."""
    head = _HEAD.pack(kind, key_id, store_id(store))
    names = b"".join(struct.pack("<I", len(name)) + name for name in (store.encode(), purpose.encode()))
    return _DOMAIN + head + names + hashlib.sha256(content).digest()


def store_id(store: str) -> bytes:
    """8 bytes that tell the names of stores apart."""
    return hashlib.sha256(b"engine_loader store\0" + store.encode()).digest()[:8]
