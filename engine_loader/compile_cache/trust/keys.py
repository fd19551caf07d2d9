"""Keys as text, a key a line, and the files that hold them: the first that can sign signs, and all verify.

a secret of 16 bytes or more          HMAC-SHA256
ed25519-private:BASE64                signs, and verifies
ed25519-public:BASE64                 verifies
# …                                   nothing
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...home import home_expanded
from ..cache_errors import CacheValidationError
from ..ownership import open_to_others
from . import ed25519
from .places import made_up_owners, replaceable, steps_to
from .signatures import HmacKey, Key

SETTING = "compile_cache.key_file"
PRIVATE = "ed25519-private:"
PUBLIC = "ed25519-public:"
_LEAST_SECRET_BYTES = 16
_MOST_FILE_BYTES = 1 << 16
_MAKE_ONE = "make one with `engine-loader compile-cache keygen FILE`, or `head -c 32 /dev/urandom | base64`"


@dataclass(frozen=True)
class KeyFile:
    """The keys of a file, and what is unwise about it, a line each."""

    keys: tuple[Key, ...]
    warnings: tuple[str, ...] = ()


def read_key_file(name: str) -> KeyFile:
    """Read a key file.

    Raises:
        CacheValidationError: it cannot be read, holds no usable key, or others may write or replace it.
    """
    try:
        path = home_expanded(name)
    except OSError as error:
        raise CacheValidationError(f"{SETTING}: {name}: {error.strerror}") from None
    where = f"{SETTING}: {path}"
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(_MOST_FILE_BYTES + 1)
        if reason := _replaceable_file(path, facts):
            raise CacheValidationError(f"{where} is refused: {reason}, so others could put their own keys there")
        open_for_reading = _readable_by_others(path, facts)
    except OSError as error:
        raise CacheValidationError(f"{SETTING}: could not read {path}: {error.strerror or error}") from None
    if len(content) > _MOST_FILE_BYTES:
        raise CacheValidationError(f"{where} is not a key file: it has more than {_MOST_FILE_BYTES >> 10} KiB")
    keys = parse_keys(content.splitlines(), where)
    if not keys:
        raise CacheValidationError(f"{where} holds no key; {_MAKE_ONE}")
    if open_for_reading and any(key.can_sign for key in keys):
        return KeyFile(keys, (f"{where}: {open_for_reading}",))
    return KeyFile(keys)


def parse_keys(lines: Iterable[bytes], where: str) -> tuple[Key, ...]:
    """The keys that lines hold.

    Raises:
        CacheValidationError: one is no key; the message begins with ``where`` and names the line, not its content.
    """
    found: list[Key] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith(b"#"):
            found.append(_parse_key(text, f"{where}, line {number}"))
    return tuple(found)


def parse_public_keys(text: str) -> tuple[Key, ...]:
    """The public keys of the setting ``public_keys``.

    Raises:
        CacheValidationError: one is no public key.
    """
    where = "compile_cache.public_keys"
    words = text.replace(",", " ").split()
    if not all(word.startswith(PUBLIC) for word in words):
        raise CacheValidationError(f"{where} holds something else than {PUBLIC}…: secrets belong into {SETTING}")
    return parse_keys([word.encode() for word in words], where)


def new_key(kind: Literal["hmac", "ed25519"]) -> str:
    """A new key, as a line of a key file."""
    if kind == "hmac":
        return base64.b64encode(secrets.token_bytes(32)).decode()
    ed25519.require()
    return PRIVATE + base64.b64encode(secrets.token_bytes(ed25519.SIZE)).decode()


def public_line(key: Key) -> str | None:
    """The line for nodes that only verify; None for a secret, which has none."""
    return PUBLIC + base64.b64encode(key.public).decode() if isinstance(key, ed25519.PublicKey) else None


def signing_key(keys: Sequence[Key]) -> Key | None:
    """The key that signs, or None."""
    return next((key for key in keys if key.can_sign), None)


def _parse_key(text: bytes, where: str) -> Key:
    for prefix in (PRIVATE, PUBLIC):
        if text.startswith(prefix.encode()):
            try:
                ed25519.require()
            except CacheValidationError as error:
                raise CacheValidationError(f"{where}: {error}") from None
            raw = _decoded(text.removeprefix(prefix.encode()), where)
            return ed25519.SigningKey.of(raw) if prefix == PRIVATE else ed25519.PublicKey(raw)
    if len(text) < _LEAST_SECRET_BYTES:
        raise CacheValidationError(
            f"{where}: a secret of {len(text)} bytes, and {_LEAST_SECRET_BYTES} or more are needed; {_MAKE_ONE}"
        )
    return HmacKey(text)


def _decoded(text: bytes, where: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        raw = b""
    if len(raw) != ed25519.SIZE:
        raise CacheValidationError(f"{where}: this is not an Ed25519 key: {ed25519.SIZE} bytes in base64 are meant")
    return raw


def _replaceable_file(path: Path, facts: os.stat_result) -> str | None:
    if reason := open_to_others(facts):
        return f"{reason} (run `chmod 600 {path}`)"
    if found := replaceable(path):
        return f"{found[1]}: {found[0]} above it"
    return made_up_owners(path)


def _readable_by_others(path: Path, facts: os.stat_result) -> str | None:
    """What to say of a file of secrets that others can read, or None.

    A secret that root mounts for a group of this process (Kubernetes with fsGroup) is readable by it on purpose.
    """
    mine = {os.getegid(), *os.getgroups()}
    mask = stat.S_IROTH if facts.st_uid == 0 and facts.st_gid in mine else stat.S_IROTH | stat.S_IRGRP
    directories = [mode for _, found in steps_to(path) if stat.S_ISDIR(mode := found.st_mode)]
    closed = any(not mode & (stat.S_IXGRP | stat.S_IXOTH) for mode in directories)
    if closed or not facts.st_mode & mask:
        return None
    return (
        f"others may read it (mode {stat.S_IMODE(facts.st_mode):o}), and who has a secret signs what engines run; "
        f"run `chmod 600 {path}` (in Kubernetes, give the volume of the secret `defaultMode: 0400`)"
    )
