"""Whether other users could have written a file: caches are code, and their writer runs code here."""

from __future__ import annotations

import os
import stat


def open_to_others(facts: os.stat_result) -> str | None:
    """Why a file or directory may be another user's work, or None: it is this user's or root's, and closed."""
    if facts.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {facts.st_uid}"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it (mode {stat.S_IMODE(facts.st_mode):o})"
    return None
