"""The deny-list of a store: packs that are well signed and known to be bad.

It is a signed object in the store, with a counter that grows by one at each change. Each node notes the newest list
that it has seen, so that who can write the store and not sign cannot bring back an older one on that node.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from ..cache_errors import CacheError, CacheValidationError
from .places import make_private
from .signatures import store_id

NAME = "denied.json"
PURPOSE = "deny-list"
_MOST_BYTES = 4 << 20
MOST_COPY_BYTES = 64 << 10
"""A list up to this size stands in the store's marker, too, which every restore reads."""
_MOST_REASON_CHARS = 500
_DIGEST = re.compile(r"[0-9a-f]{64}")

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes, str], None]


class _Small(Protocol):
    @property
    def content(self) -> bytes: ...


class ObjectStore(Protocol):
    """What a deny-list needs of a store (stores/interface.py)."""

    description: str

    @property
    def name(self) -> str: ...

    @property
    def denies(self) -> bool: ...

    @property
    def denied_copy(self) -> Any: ...

    def announce_denied(self, copy: Any = None) -> None: ...

    def read(self, name: str, most_bytes: int) -> _Small: ...

    def replace(self, name: str, content: bytes) -> bool: ...


@dataclass(frozen=True)
class DenyList:
    """Packs that are not taken.

    Attributes:
        counter: of changes since the store was made.
        packs: digest (64 hexadecimal digits, a pack's name) -> the reason.
    """

    counter: int = 0
    packs: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def to_json(self) -> bytes:
        return json.dumps({"counter": self.counter, "packs": dict(self.packs)}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> DenyList:
        """Raises ValueError when it is no deny-list."""
        try:
            value = json.loads(text)
            counter, packs = value["counter"], value["packs"]
            if type(counter) is not int or counter < 0 or not isinstance(packs, dict):
                raise ValueError("its values are none of a deny-list")
            return cls(counter, {str(digest): str(reason) for digest, reason in packs.items()})
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def with_denied(self, digests: Mapping[str, str]) -> DenyList:
        """The next list, with these packs (digest -> reason) as well.

        Raises:
            CacheValidationError: one is no digest.
        """
        for digest in digests:
            if not _DIGEST.fullmatch(digest):
                raise CacheValidationError(f"{digest!r} names no pack: 64 hexadecimal digits are meant")
        reasons = {digest: reason[:_MOST_REASON_CHARS] for digest, reason in digests.items()}
        return DenyList(self.counter + 1, {**self.packs, **reasons})

    def without(self, digests: set[str]) -> DenyList:
        """The next list, without these packs.

        Raises:
            CacheValidationError: one is not denied.
        """
        if unknown := digests - set(self.packs):
            raise CacheValidationError(f"not on the deny-list: {', '.join(sorted(unknown))}")
        return DenyList(
            self.counter + 1, {digest: reason for digest, reason in self.packs.items() if digest not in digests}
        )


def newest(store: ObjectStore, verify: Verify, note: Path | None) -> tuple[DenyList, list[str]]:
    """The deny-list that counts, and what is wrong with the store's, a line each.

    Args:
        verify: (content, signature block, location), raises CacheValidationError.
        note: this node's note of the newest list; read, and brought up to date. None: there is none.
    """
    problems: list[str] = []
    noted = _noted(note)
    # The marker is read anyway: neither a store without a list nor one with a short list costs a request for it.
    found = _copied(store, verify)
    if found is None or found.counter < noted.counter:
        found = _read(store, verify, problems) if noted.counter or store.denies else None
    if found is not None and found.counter >= noted.counter:
        packs = {**noted.packs, **found.packs} if found.counter == noted.counter else found.packs
        found = DenyList(found.counter, packs)
        if note is not None and found != noted:
            _write_note(note, found)
        return found, problems
    if noted.counter:
        state = "is missing or does not verify" if found is None else f"is number {found.counter}"
        problems.append(
            f"{store.description}/{NAME} {state}, and this node has seen number {noted.counter}: it was put back by "
            "someone; what was denied stays denied here. Write it again with `engine-loader compile-cache deny --renew`"
        )
    return noted, problems


def deny_note(state: Path | None, store_name: str) -> Path | None:
    """The file in the directory ``state`` that notes the newest deny-list of a store; None without a directory."""
    return None if state is None else state / f"denied-{store_id(store_name).hex()}.json"


def publish(store: ObjectStore, sign: Sign, denied: DenyList, note: Path | None) -> None:
    """Write the list into the store.

    Raises:
        CacheValidationError: this node cannot sign.
        OSError: the store fails.
    """
    text = denied.to_json()
    value = {"list": text.decode(), "signature": base64.b64encode(sign(text)).decode()}
    content = json.dumps(value).encode()
    store.replace(NAME, content)
    store.announce_denied(value if len(content) <= MOST_COPY_BYTES else None)
    if note is not None:
        _write_note(note, denied)


def _read(store: ObjectStore, verify: Verify, problems: list[str]) -> DenyList | None:
    """The list of the store; None without one that verifies."""
    location = f"{store.description}/{NAME}"
    try:
        return _verified(json.loads(store.read(NAME, _MOST_BYTES).content), verify, location)
    except FileNotFoundError:
        return None
    except (CacheError, OSError) as error:
        problems.append(f"the deny-list is passed over: {error}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problems.append(f"the deny-list is passed over: {location} cannot be read: {type(error).__name__}")
    return None


def _copied(store: ObjectStore, verify: Verify) -> DenyList | None:
    """The list of which the marker has a copy; None without one that verifies."""
    with suppress(CacheError, ValueError, KeyError, TypeError, RecursionError):
        if (copy := store.denied_copy) is not None:
            return _verified(copy, verify, store.description)
    return None


def _verified(value: Any, verify: Verify, location: str) -> DenyList:
    text = str(value["list"]).encode()
    verify(text, base64.b64decode(value["signature"], validate=True), location)
    return DenyList.from_json(text)


def _noted(note: Path | None) -> DenyList:
    if note is not None:
        with suppress(OSError, ValueError):
            return DenyList.from_json(note.read_bytes())
    return DenyList()


def _write_note(note: Path, denied: DenyList) -> None:
    with suppress(OSError):  # without a note, the store's own list counts
        make_private(note.parent)
        unfinished = note.with_name(f"{note.name}.{os.getpid()}.tmp")
        unfinished.write_bytes(denied.to_json())
        unfinished.replace(note)
