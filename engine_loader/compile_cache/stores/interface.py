"""What a store of packs does: a few verbs that file systems and object stores both have. See ``filesystem`` for an
example.

A name is "<environment>_<hash>/<scope>/<content hash>.tar.zst". What is under a name never changes. A pack
is visible as a whole or not at all.
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
        modified: when it was written, or last used where the store keeps that; seconds since the epoch.
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


@dataclass(frozen=True)
class Small:
    """A small object with its content."""

    stored: Stored
    content: bytes


class Readable(Protocol):
    """An opened pack. May be read by several threads at once."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes; OSError when they are not there."""


class Upload(Protocol):
    """A pack that is being written, and that readers do not see."""

    def write(self, content: bytes) -> None:
        """Append ``content``."""

    def commit(self, name: str) -> None:
        """Make the pack visible under ``name``. Where that exists, its content is the same, and either stays."""


class Store(Protocol):
    """A store of packs. Errors of the storage are OSErrors; what is not trusted is a CacheValidationError."""

    description: str

    @property
    def name(self) -> str:
        """The store's name, which signatures cover; empty where none is set."""

    def list(self, prefix: str = "") -> Iterable[Stored]:
        """All packs below ``prefix`` (a key's; empty: of all keys). A store that does not exist has none."""

    def open(self, name: str) -> AbstractContextManager[Readable]:
        """Open a pack for reading."""

    def upload(self, prefix: str) -> AbstractContextManager[Upload]:
        """Begin a pack of the key with ``prefix``. Without a commit, what was written is deleted at the end."""

    def read(self, name: str, most_bytes: int) -> Small:
        """A small object.

        Raises:
            FileNotFoundError: there is none.
            CacheValidationError: it is larger than ``most_bytes``, or not trusted.
        """

    def replace(self, name: str, content: bytes) -> bool:
        """Write a small object in place of what is there; whether it was written."""

    def mark_used(self, name: str) -> None:
        """Note that a pack is in use, where the store can: retention counts from then. Raises nothing."""

    def delete(self, name: str) -> None:
        """Delete a pack. A pack that does not exist is no error."""

    def unfinished(self) -> Iterator[Stored]:
        """Files of writers that are still writing, or that ended before a commit."""

    def make_room(self, coming: int) -> None:
        """Check the room for ``coming`` bytes.

        Raises:
            CacheOperationInterrupted: they do not fit.
        """
