"""How packs are signed, and which of them are taken."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from ..cache_errors import CacheError, CacheValidationError
from .denied import PURPOSE as DENY_LIST
from .denied import DenyList, ObjectStore, deny_note, newest, publish
from .keys import KeyFile, parse_public_keys, read_key_file, signing_key
from .places import check_above, check_mount, check_private
from .signatures import KINDS, PLAIN, Block, HmacKey, Key, PlainDigest, make_block, signed_message, store_id

PACK = "pack"
CANNOT_SIGN = (
    "nothing was saved: this node has public keys only, which restore packs and cannot sign any; "
    "give compile_cache.key_file a signing key, or set compile_cache.read_only: true"
)


class Trust:
    """How packs are signed and verified.

    Args:
        keys: all verify, and the first that can sign signs; or a secret for HMAC-SHA256. Empty: packs have a plain
            digest, which finds damage and no forgery.
        anyone: take packs that others could have written (only without keys).
        most_age_days: older packs are refused; None: age does not count.
        denied: packs that are refused.
        warnings: what is unwise about the keys, or wrong with the deny-list, a line each.
    """

    def __init__(
        self,
        keys: bytes | Sequence[Key] = (),
        *,
        anyone: bool = False,
        most_age_days: float | None = None,
        denied: DenyList | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.keys: tuple[Key, ...] = (HmacKey(keys),) if isinstance(keys, bytes) else tuple(keys)
        self.anyone = anyone
        self.most_age_days = most_age_days
        self.denied = denied or DenyList()
        self.warnings = tuple(warnings)
        self._devices: set[int] = set()  # whose mounts were checked

    @property
    def signed(self) -> bool:
        """Whether only signed packs are taken."""
        return bool(self.keys)

    @property
    def can_sign(self) -> bool:
        """Whether packs can be written; False on a node that has public keys only."""
        return not self.keys or signing_key(self.keys) is not None

    def describe(self) -> str:
        """Which packs are taken, in a few words."""
        if self.signed:
            return "signed" if self.can_sign else "signed, by others only"
        return "from anyone" if self.anyone else "trusted by owner"

    def sign(self, content: bytes, *, store: str = "", purpose: str = PACK) -> bytes:
        """The signature block over ``content``, at most ``signatures.MOST_BLOCK_BYTES``.

        Args:
            store: the name of the store. It is inside what is signed: a pack of one store is none of another's.

        Raises:
            CacheValidationError: this node has public keys only.
        """
        return make_block(self._signer(), content, store, purpose)

    def verify(self, content: bytes, block: bytes, location: str, *, store: str = "", purpose: str = PACK) -> None:
        """Raises CacheValidationError when ``block`` is none that ``sign`` makes of the same with one of the keys."""
        if reason := self._problem(content, block, store, purpose):
            raise CacheValidationError(f"{location}: refused: {reason}")

    def is_by_signer(self, block: bytes) -> bool:
        """Whether a block that was verified is by the key that signs now; True where none can sign."""
        signer = signing_key(self.keys)
        return signer is None or Block.parse(block).key_id == signer.id

    def with_denied(self, store: ObjectStore, state: Path | None) -> Trust:
        """The trust with the store's deny-list.

        Args:
            state: a directory of this node, where the newest list of each store is noted; None: nothing is noted.
        """
        try:
            name = store.name
        except (CacheError, OSError):
            return self  # the store is refused when it is read
        verify = partial(self.verify, store=name, purpose=DENY_LIST)
        denied, problems = newest(store, verify, deny_note(state, name))
        return self._with(denied=denied, warnings=(*self.warnings, *problems))

    def without_denied(self) -> Trust:
        """The trust that refuses no pack for the deny-list."""
        return self._with(denied=DenyList())

    def publish_denied(self, store: ObjectStore, denied: DenyList, state: Path | None) -> None:
        """Write a deny-list into the store, and note it in ``state``.

        Raises:
            CacheValidationError: this node cannot sign.
            OSError: the store fails.
        """
        self._signer()  # so that a node that cannot sign changes nothing
        store.announce_denied()
        sign = partial(self.sign, store=store.name, purpose=DENY_LIST)
        publish(store, sign, denied, deny_note(state, store.name))

    def check_pack(self, names: Sequence[str], created: float, location: str, *, now: float | None = None) -> None:
        """Refuse a pack whose signature is right and that is not taken all the same.

        Args:
            names: digests by which it may be denied: the pack's name, and that of its content.
            created: seconds since the epoch, as its manifest says.
            now: of the store; None: this machine's clock.

        Raises:
            CacheValidationError: it is on the deny-list, or too old.
        """
        reason = next((self.denied.packs[name] for name in names if name in self.denied.packs), None)
        if reason is not None:
            raise CacheValidationError(
                f"{location}: refused: it is on the deny-list ({shown(reason)}); "
                "where it was restored before, run `engine-loader compile-cache clear`"
            )
        age_days = ((time.time() if now is None else now) - created) / 86400
        if self.most_age_days is not None and age_days > self.most_age_days:
            raise CacheValidationError(
                f"{location}: refused: it was made {age_days:.0f} days ago, "
                f"and compile_cache.max_pack_age_days is {self.most_age_days:g}"
            )

    def check_entry(self, path: Path, facts: os.stat_result | None = None) -> None:
        """Refuse a file or directory of a store that others may write, where only its owner vouches for it."""
        if not self.signed and not self.anyone:
            facts = facts or os.stat(path)
            self._check_mount(path, facts)
            check_private(path, facts)

    def check_store(self, directory: Path) -> None:
        """Refuse the directory of a store that others may write or replace, where only its owner vouches for it."""
        if not self.signed and not self.anyone:
            self._check_mount(directory, os.stat(directory))
            check_private(directory)
            check_above(directory)

    def _check_mount(self, path: Path, facts: os.stat_result) -> None:
        if facts.st_dev not in self._devices:
            check_mount(path)
            self._devices.add(facts.st_dev)

    def _with(self, **changes: Any) -> Trust:
        new = copy(self)
        vars(new).update(changes)
        return new

    def _signer(self) -> Key:
        if not self.keys:
            return PlainDigest()
        if key := signing_key(self.keys):
            return key
        raise CacheValidationError(CANNOT_SIGN)

    def _problem(self, content: bytes, block: bytes, store: str, purpose: str) -> str | None:
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
        if parsed.store_id != store_id(store):
            return "it was made for another store, or is damaged: packs are not copied between stores"
        message = signed_message(parsed.kind, parsed.key_id, content, store, purpose)
        if key.verify(message, parsed.signature):
            return None
        return f"its {kind} is wrong: forged or damaged" if self.keys else "its digest does not match: it is damaged"

    def _key_of(self, block: Block) -> Key | None:
        for key in self.keys or (PlainDigest(),):
            if (key.kind, key.id) == (block.kind, block.key_id):
                return key
        return None


def load_trust(
    key_file: str | None,
    public_keys: str | None = None,
    *,
    anyone: bool = False,
    most_age_days: float | None = None,
) -> Trust:
    """Read the keys.

    Args:
        key_file: signs and verifies.
        public_keys: verify too.

    Raises:
        CacheValidationError: the key file cannot be read, holds no usable key, or others may write or replace it; or
            there is something else among the public keys.
    """
    file = read_key_file(key_file) if key_file else KeyFile(())
    keys = (*file.keys, *parse_public_keys(public_keys or ""))
    return Trust(keys, anyone=anyone, most_age_days=most_age_days, warnings=file.warnings)


def shown(text: str) -> str:
    """A text from outside, in one line and without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
