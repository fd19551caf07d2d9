"""Whether other users could have written a file: caches are code, and their writer runs code here."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace


def open_to_others(facts: os.stat_result) -> str | None:
    """Why a file or directory may be another user's work, or None: it is this user's or root's, and closed."""
    if facts.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {facts.st_uid}"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it (mode {stat.S_IMODE(facts.st_mode):o})"
    return None


@dataclass(frozen=True)
class Access:
    """What a walk through a local cache takes, from the cache's directory downwards.

    Attributes:
        anyone: also what others may have written (compile_cache.trust=anyone).
        closed_on: the device of a directory above that nobody else can enter: what the modes below it allow, nobody
            can do (an engine with umask 0). None: there is none.
    """

    anyone: bool = False
    closed_on: int | None = None

    def problem(self, facts: os.stat_result) -> str | None:
        """Why a file or directory is not taken, or None."""
        if self.anyone:
            return None
        if self.closed_on == facts.st_dev and facts.st_uid in (0, os.geteuid()):
            return None
        return open_to_others(facts)

    def below(self, facts: os.stat_result) -> Access:
        """For what lies in a directory that was taken."""
        if not facts.st_mode & (stat.S_IXGRP | stat.S_IXOTH):
            return replace(self, closed_on=facts.st_dev)
        return self if self.closed_on == facts.st_dev else replace(self, closed_on=None)


def is_own_link(facts: os.stat_result, access: Access) -> bool:
    """Whether a symbolic link was made by this user or root."""
    return access.anyone or facts.st_uid in (0, os.geteuid())
