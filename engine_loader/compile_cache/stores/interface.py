"""What a store of packs is: a few verbs that a file system and an object store both have.

A name is "<environment>_<hash>/<scope>/<content hash>.tar.zst". What is under a name never changes. A put is seen as a
whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

SUFFIX = ".tar.zst"


@dataclass(frozen=True)
class Stored:
    """A pack in a store.

    Attributes:
        name: where it is in the store.
        size: bytes.
        modified: when it came there, seconds since the epoch.
    """

    name: str
    size: int
    modified: float

    @property
    def key_prefix(self) -> str:
        """The key's part of the name."""
        return self.name.rpartition("/")[0]

    @property
    def digest(self) -> str:
        """The content hash in the name."""
        return self.name.rpartition("/")[2].removesuffix(SUFFIX)


class Readable(Protocol):
    """An opened pack. May be read by several threads at once."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes; OSError when they are not there."""


class Upload(Protocol):
    """A pack that is being written, and that nobody sees."""

    def write(self, content: bytes) -> None:
        """Append."""

    def commit(self, name: str) -> None:
        """Make it seen under ``name``; where that exists, it has the same content, and stays."""


class Store(Protocol):
    """Errors of the storage are OSErrors; what is not to be trusted is a CacheValidationError."""

    description: str

    def list(self, prefix: str = "") -> Iterable[Stored]:
        """All packs below ``prefix``, a key's or none; nothing when there is nothing."""

    def open(self, name: str) -> AbstractContextManager[Readable]:
        """Open a pack for reading."""

    def upload(self, prefix: str) -> AbstractContextManager[Upload]:
        """Begin a pack of the key with ``prefix``. What was not committed at the end is gone."""

    def mark_used(self, name: str) -> None:
        """Note that a pack is in use, where the store can: retention counts from there. Never fails."""

    def delete(self, name: str) -> None:
        """Delete a pack; one that is not there is no error."""

    def unfinished(self) -> Iterator[Stored]:
        """What writers left that died, or are still writing."""

    def make_room(self, coming: int) -> None:
        """Raises CacheOperationInterrupted when ``coming`` bytes do not fit."""
