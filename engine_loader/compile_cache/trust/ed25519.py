"""Ed25519 keys, by the package `cryptography`: who can check a signature cannot make one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..cache_errors import CacheValidationError
from .signatures import ED25519

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIZE = 32
"""Bytes of a public key, and of the seed of a signing key."""


@dataclass(frozen=True)
class PublicKey:
    """Checks signatures."""

    public: bytes
    kind = ED25519
    can_sign = False

    @property
    def id(self) -> bytes:
        return hashlib.sha256(b"engine_loader key id" + self.public).digest()[:8]

    def sign(self, message: bytes) -> bytes:
        raise TypeError("a public key cannot sign")

    def verify(self, message: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self._loaded().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def _loaded(self) -> Ed25519PublicKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        return Ed25519PublicKey.from_public_bytes(self.public)


@dataclass(frozen=True)
class SigningKey(PublicKey):
    """Makes signatures, and checks them."""

    seed: bytes = field(repr=False, default=b"")
    can_sign = True

    @classmethod
    def of(cls, seed: bytes) -> SigningKey:
        return cls(_private(seed).public_key().public_bytes_raw(), seed)

    def sign(self, message: bytes) -> bytes:
        return _private(self.seed).sign(message)


def require() -> None:
    """Raises CacheValidationError when `cryptography` is not installed."""
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError as error:
        raise CacheValidationError(
            f"Ed25519 keys need the package cryptography ({error}): `pip install 'engine-loader[signing]'`"
        ) from None


def _private(seed: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(seed)
