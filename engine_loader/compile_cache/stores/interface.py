"""What a store of packs does: a few verbs that file systems and object stores both have. See ``filesystem`` for an
example, and ``object_names`` for what lies in a store.

What is under the name of a pack never changes, and is visible as a whole or not at all.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ..store_reads import Reads
from .object_names import SUFFIX, Kind, kind_of


@dataclass(frozen=True)
class Stored:
    """An object in a store.

    Attributes:
        name: where it is in the store.
        size: bytes.
        modified: when it was written, in the store's time; seconds since the epoch.
        version: differs when another content was written under the name; empty where that is not known.
    """

    name: str
    size: int
    modified: float
    version: str = ""

    @property
    def key_prefix(self) -> str:
        """The key's part of the name."""
        return self.name.rpartition("/")[0]

    @property
    def base(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def kind(self) -> Kind:
        """What it is."""
        return kind_of(self.name)

    @property
    def digest(self) -> str:
        """The content hash in a pack's name, or in that of a note about a pack."""
        return self.base.removesuffix(SUFFIX).rpartition("-")[2]


@dataclass(frozen=True)
class Small:
    """A small object with its content."""

    stored: Stored
    content: bytes


class PackReplacedError(FileNotFoundError):
    """What was listed under a pack's name is gone, and another object has its name: list again."""

    def __init__(self, location: str) -> None:
        super().__init__(errno.ESTALE, "the pack was replaced since it was listed: list again", location)


class Readable(Protocol):
    """An opened pack. May be read by several threads at once."""

    size: int

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which (offset, size) will each be read once, so that neighbours may be fetched together."""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes; OSError when they are not there."""


class Upload(Protocol):
    """A pack that is being written, and that readers do not see."""

    def write(self, content: bytes) -> None:
        """Append ``content``."""

    def commit(self, name: str) -> Stored | None:
        """Make the pack visible under ``name``, as what is returned. None where that exists: its content is equal, and
        it stays.
        """


class Store(Protocol):
    """A store of packs. Errors of the storage are OSErrors; what is not trusted is a CacheValidationError.

    Attributes:
        description: the path or URL, for messages.
        unreadable: what the last listing could not look into, with the reason; for messages.
        reads: what was read, in pieces; of an object store nothing is noted.
    """

    description: str
    unreadable: list[str]
    reads: Reads

    @property
    def name(self) -> str:
        """The store's name, as its marker says; empty for a store in which nothing was ever saved.

        Raises:
            CacheValidationError: there is something, but no marker; or it is another store than the settings name.
        """

    @property
    def denies(self) -> bool:
        """Whether the marker says that there is a deny-list. Raises as ``name``."""

    @property
    def denied_copy(self) -> Any:
        """The deny-list as the marker has it, unverified; None where it has none. Raises as ``name``."""

    def announce_denied(self, copy: Any = None) -> None:
        """Let the marker say that there is a deny-list, and hold ``copy`` of it.

        Raises as ``name``, and OSError when the store fails.
        """

    def found(self) -> None:
        """Write the marker where the store is empty. Raises as ``name``."""

    def is_empty(self) -> bool:
        """Whether nothing at all lies in the store."""

    def entries(self, prefix: str = "") -> list[Stored]:
        """All objects with names of ours below ``prefix`` (a key's, or ``SAVING``; empty: all), sorted by name. A store
        that does not exist has none.
        """

    def was_listed(self, name: str) -> bool:
        """Whether a listing has shown an object."""

    def list(self, prefix: str = "") -> list[Stored]:
        """The packs among ``entries``."""

    def open(self, name: str) -> AbstractContextManager[Readable]:
        """Open a pack for reading."""

    def vouch(self, stored: Stored) -> None:
        """Check what opening a listed object would check, without opening it.

        Raises:
            CacheValidationError: it is not trusted.
        """

    def upload(self, prefix: str) -> AbstractContextManager[Upload]:
        """Begin a pack of the key with ``prefix``. Without a commit, what was written is deleted at the end."""

    def read(self, name: str, most_bytes: int) -> Small:
        """A small object.

        Raises:
            FileNotFoundError: there is none.
            CacheValidationError: it is larger than ``most_bytes``, or not trusted.
        """

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object where there is none; whether it was written."""

    def replace(self, name: str, content: bytes, version: str | None = None) -> bool:
        """Write a small object in place of what is there (with ``version``: only of that); whether it was written."""

    def delete(self, name: str) -> None:
        """Delete an object, and its key's directories when they are empty then. One that is not there is no error."""

    def now(self) -> float:
        """The time of the store's own clock, in seconds since the epoch; this machine's where that is not known."""

    def known_time(self) -> float:
        """As ``now``, as far as it is known without writing anything."""

    def make_room(self, coming: int) -> None:
        """Check the room for ``coming`` bytes.

        Raises:
            CacheOperationInterrupted: they do not fit.
        """
