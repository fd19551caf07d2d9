"""Reads every byte of packs, and reports which are damaged, forged or not trusted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ..cache_errors import CacheError, CacheValidationError
from ..stores.interface import Readable, Store, Stored
from ..trust import Trust
from .pack import DamagedFrameError, Pack, read_frame, read_manifest


@dataclass(frozen=True)
class Verified:
    """A pack, and what is wrong with it.

    Attributes:
        problem: None where nothing is.
        damaged: the frames that are damaged in a pack that is trusted otherwise.
        quarantined: whether it is out of use.
    """

    stored: Stored
    problem: str | None
    files: int = 0
    bytes: int = 0
    damaged: tuple[int, ...] = ()
    quarantined: bool = False


def verify(store: Store, trust: Trust, prefix: str = "") -> Iterator[Verified]:
    """Every pack below ``prefix``, one after another."""
    entries = list(store.entries(prefix))
    out = {(entry.key_prefix, entry.digest) for entry in entries if entry.kind == "quarantined"}
    for stored in (entry for entry in entries if entry.kind == "pack"):
        quarantined = (stored.key_prefix, stored.digest) in out
        try:
            pack = read_manifest(store, stored, stored.key_prefix, trust)
            damaged, problem = _damaged(store, pack, range(len(pack.manifest.frames)))
            manifest = pack.manifest
            yield Verified(stored, problem, len(manifest.files), manifest.content_bytes, damaged, quarantined)
        except FileNotFoundError:
            continue  # pruned meanwhile
        except (OSError, CacheError) as error:
            yield Verified(stored, str(error), quarantined=quarantined)


def damaged_frames(store: Store, packs: Iterable[Pack], suspected: Collection[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those of the ``suspected`` frames, each as (name of its pack, index), that are damaged, or cannot be read."""
    found: set[tuple[str, int]] = set()
    for pack in packs:
        name = pack.stored.name
        frames = [index for index in range(len(pack.manifest.frames)) if (name, index) in suspected]
        if not frames:
            continue
        try:
            found |= {(name, index) for index in _damaged(store, pack, frames)[0]}
        except (OSError, CacheError):
            found |= {(name, index) for index in frames}
    return found


def _damaged(store: Store, pack: Pack, frames: Iterable[int]) -> tuple[tuple[int, ...], str | None]:
    """Which of a pack's frames are damaged, and the first one's problem.

    Raises:
        CacheValidationError: the archive is not what the manifest says.
        OSError: the store fails.
    """
    damaged: list[int] = []
    problem: str | None = None
    location = f"{store.description}/{pack.stored.name}"
    with store.open(pack.stored.name) as file:
        for index in frames:
            try:
                _verify_frame(file, pack, index, location)
            except DamagedFrameError as error:
                damaged.append(index)
                problem = problem or str(error)
    return tuple(damaged), problem


def _verify_frame(file: Readable, pack: Pack, index: int, location: str) -> None:
    content = read_frame(file, pack.manifest.frames[index], location)
    for member in (member for member in pack.manifest.files if member.frame == index):
        head = member.head()
        if content[member.offset : member.offset + len(head)] != head:
            raise CacheValidationError(f"{location}: the archive and the manifest differ at {member.path!r}")
