"""Whose packs are taken. Caches are code: the writer of a pack runs code in every engine that restores it.

With a key file, a pack counts when its HMAC-SHA256 is right, wherever it lies. Without one, it counts when only
this user and root could have written it. docs/security.md states the model.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from .cache_errors import CacheValidationError
from .ownership import open_to_others as _open_to_others

TAG_BYTES = 32
_DOMAIN = b"engine_loader compile cache pack 1\0"
_LEAST_KEY_BYTES = 16
_MOST_KEY_BYTES = 1 << 16


@dataclass(frozen=True)
class Trust:
    """How packs are signed and verified.

    Attributes:
        secret: the content of the key file; None without one.
        anyone: take packs that others could have written (only without a secret).
    """

    secret: bytes | None = None
    anyone: bool = False

    def sign(self, content: bytes) -> bytes:
        """The tag over what ``content`` says; without a secret a plain digest, which finds damage and no forgery."""
        if self.secret is None:
            return hashlib.sha256(_DOMAIN + content).digest()
        return hmac.digest(self.secret, _DOMAIN + content, "sha256")

    def verify(self, content: bytes, tag: bytes, location: str) -> None:
        """Raises CacheValidationError when the tag is not the one that ``sign`` makes."""
        if hmac.compare_digest(tag, self.sign(content)):
            return
        if self.secret is None:
            damaged = "it is damaged, or was signed with a key file: set compile_cache.key_file to the same one"
            raise CacheValidationError(f"{location}: refused: its digest does not match: {damaged}")
        unsigned = hmac.compare_digest(tag, Trust().sign(content))
        why = (
            "it was not signed"
            if unsigned
            else "its HMAC is not of this key file: forged, damaged, or made with another key"
        )
        raise CacheValidationError(f"{location}: refused: {why}")

    def check_entry(self, path: Path, facts: os.stat_result | None = None) -> None:
        """Refuse a file or directory of a store that others may write, where only its owner vouches for it."""
        if self.secret is None and not self.anyone:
            check_private(path, facts)

    def check_store(self, directory: Path) -> None:
        """Refuse the directory of a store that others may write or replace, where only its owner vouches for it."""
        if self.secret is None and not self.anyone:
            check_private(directory)
            check_above(directory)


def load_trust(key_file: str | None, *, anyone: bool = False) -> Trust:
    """Read the key file.

    Raises:
        CacheValidationError: it cannot be read, is too short or too long, or others may write it.
    """
    if not key_file:
        return Trust(anyone=anyone)
    path = Path(key_file).expanduser()
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            secret = file.read(_MOST_KEY_BYTES + 1).strip()
    except OSError as error:
        raise CacheValidationError(f"compile_cache.key_file: could not read {path}: {error.strerror}") from None
    if reason := _open_to_others(facts):
        raise CacheValidationError(f"compile_cache.key_file: {path} is refused: {reason}; run `chmod 600 {path}`")
    if not _LEAST_KEY_BYTES <= len(secret) <= _MOST_KEY_BYTES:
        raise CacheValidationError(
            f"compile_cache.key_file: {path} holds {len(secret)} bytes, {_LEAST_KEY_BYTES} or more are needed; "
            f"make one with `head -c 32 /dev/urandom | base64 > {path}`"
        )
    return Trust(secret)


def check_private(path: Path, facts: os.stat_result | None = None) -> None:
    """Raises CacheValidationError when other users than this one and root may write ``path``."""
    reason = _open_to_others(facts or os.stat(path))
    if reason:
        raise CacheValidationError(
            f"{path}: refused: {reason}, and caches are code; close it (`chmod go-w`), "
            "sign packs with compile_cache.key_file, "
            "or allow it with compile_cache.trust=anyone"
        )


def check_above(path: Path) -> None:
    """Raises CacheValidationError when other users could replace the directory ``path`` by another."""
    for parent in path.resolve().parents:
        facts = os.stat(parent)
        if _open_to_others(facts) and not facts.st_mode & stat.S_ISVTX:
            raise CacheValidationError(
                f"{path}: refused: others may write {parent} above it, and caches are code; close it (`chmod go-w`), "
                "sign packs with compile_cache.key_file, or allow it with compile_cache.trust=anyone"
            )


def make_private(path: Path) -> None:
    """Make a directory and those above it that are missing, for this user only."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)
