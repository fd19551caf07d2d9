"""Which places only this user and root can write to: owners and modes along a path, and mounts that make them up."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ...machine import mount_of
from ..cache_errors import CacheValidationError
from ..ownership import open_to_others

_MOST_LINKS = 40
_WAYS_OUT = "sign packs with compile_cache.key_file, or allow it with compile_cache.trust=anyone"

# Mounts that give every file the same owner (a mount option, or the user who mounted), or whose modes are not what
# the server goes by. AFS goes by access lists.
_MADE_UP = frozenset(
    {"9p", "afs", "cifs", "coda", "drvfs", "ncpfs", "prl_fs", "smb2", "smb3", "smbfs", "vboxsf", "vmhgfs"}
)
# FUSE may show any owner. These keep each file's own, as the user who made it is known to them.
_FUSE_WITH_OWNERS = frozenset(
    {
        "fuse.beegfs",
        "fuse.ceph",
        "fuse.ceph-fuse",
        "fuse.fuse-overlayfs",
        "fuse.glusterfs",
        "fuse.hf3fs",
        "fuse.juicefs",
        "fuse.mergerfs",
        "fuse.mfs",
        "fuse.moosefs",
    }
)


def check_private(path: Path, facts: os.stat_result | None = None) -> None:
    """Raises CacheValidationError when other users than this one and root may write ``path``."""
    reason = open_to_others(facts or os.stat(path))
    if reason:
        raise CacheValidationError(
            f"{path}: refused: {reason}, and caches are code; close it (`chmod go-w`), {_WAYS_OUT}"
        )


def check_above(path: Path) -> None:
    """Raises CacheValidationError when other users could put something else in the place of the directory ``path``.

    Every directory and link on the way counts, as the kernel walks it, and not only the directories of the real path:
    who may write the directory of a link can point it elsewhere.
    """
    found = replaceable(path)
    if found is not None:
        place, reason = found
        raise CacheValidationError(
            f"{path}: refused: {reason}: {place} above it, and caches are code; close it (`chmod go-w`), {_WAYS_OUT}"
        )


def check_mount(path: Path) -> None:
    """Raises CacheValidationError when owners and modes at ``path`` say nothing about who can write there."""
    if reason := made_up_owners(path):
        raise CacheValidationError(f"{path}: refused: {reason}, and caches are code; {_WAYS_OUT}")


def made_up_owners(path: Path) -> str | None:
    """Why owners and modes at ``path`` say nothing about who can write there, or None."""
    mount = mount_of(path)
    if mount is None:
        return "the kind of its file system is not known (/proc/self/mountinfo cannot be read)"
    is_fuse = mount.kind == "fuse" or mount.kind.startswith("fuse.")
    if mount.kind in _MADE_UP or (is_fuse and mount.kind not in _FUSE_WITH_OWNERS):
        return f"{mount.point} is a mount of the kind {mount.kind}, whose owners and modes the mount makes up"
    return None


def replaceable(path: Path) -> tuple[Path, str] | None:
    """The first directory or link on the way to ``path`` that lets others replace what follows, and why; or None."""
    for step, facts in steps_to(path):
        if stat.S_ISLNK(facts.st_mode):
            if facts.st_uid not in (0, os.geteuid()):
                return step, f"it belongs to user {facts.st_uid}"
        elif (reason := open_to_others(facts)) and not _is_roots_sticky(facts):
            return step, reason
    return None


def steps_to(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every directory and symbolic link that the kernel passes on the way to ``path``, with its own facts.

    ``path`` itself is left out, unless it is a link.

    Raises:
        OSError: something on the way does not exist, or there are too many links.
    """
    pending = list(reversed(path.absolute().parts[1:]))
    here = Path("/")
    links = 0
    yield here, os.lstat(here)
    while pending:
        part = pending.pop()
        if part == "..":
            here = here.parent
            continue
        step = here / part
        facts = os.lstat(step)
        if not stat.S_ISLNK(facts.st_mode):
            here = step
            if pending:
                yield step, facts
            continue
        yield step, facts
        links += 1
        if links > _MOST_LINKS:
            raise OSError(f"{path}: too many symbolic links")
        target = Path(os.readlink(step))
        here = Path("/") if target.is_absolute() else here
        pending += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def make_private(path: Path) -> None:
    """Make a directory and those above it that are missing, for this user only."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)


def _is_roots_sticky(facts: os.stat_result) -> bool:
    """Such a directory (/tmp) lets others add entries, but not replace those of this user and of root.

    In another user's, its owner may.
    """
    return facts.st_uid == 0 and bool(facts.st_mode & stat.S_ISVTX)
