"""Which places only this user and root can write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..cache_errors import CacheValidationError


def check_private(path: Path, facts: os.stat_result | None = None) -> None:
    """Raises CacheValidationError when other users than this one and root may write ``path``."""
    reason = open_to_others(facts or os.stat(path))
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
        if open_to_others(facts) and not facts.st_mode & stat.S_ISVTX:
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


def open_to_others(facts: os.stat_result) -> str | None:
    """Why others than this user and root may write what has these facts, or None."""
    if facts.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {facts.st_uid}"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it (mode {stat.S_IMODE(facts.st_mode):o})"
    return None
