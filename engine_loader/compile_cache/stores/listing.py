"""Which files of a directory are a store's own: a walk of those directories only that have the names of keys."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .object_names import SAVING, is_environment, is_key, is_scope, kind_of


class Listing:
    """The files of a store below ``root``.

    Attributes:
        facts: name in the store -> what the last walk that passed the file saw of it.
        unreadable: directories that the last walk could not look into, with the reason.
    """

    def __init__(self, root: Path) -> None:
        self.facts: dict[str, os.stat_result] = {}
        self.unreadable: list[str] = []
        self._root = root

    def walk(self, prefix: str = "") -> list[tuple[str, os.stat_result]]:
        """(name in the store, facts) of all files of the key ``prefix``, or of ``SAVING``; empty: of all."""
        self.unreadable = []
        if prefix:
            return list(self._files(self._root / prefix)) if prefix == SAVING or is_key(prefix) else []
        found = [*self._files(self._root), *self._files(self._root / SAVING)]
        for environment in self._directories(self._root, is_environment):
            for scope in self._directories(environment, is_scope):
                found += self._files(scope)
        return found

    def _files(self, directory: Path) -> Iterator[tuple[str, os.stat_result]]:
        """The files of ours in one directory. Those that are deleted meanwhile are passed over."""
        for entry in self._scan(directory):
            name = str(Path(entry.path).relative_to(self._root))
            if kind_of(name) == "foreign":
                continue
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode):
                    self.facts[name] = facts
                    yield name, facts

    def _directories(self, directory: Path, is_ours: Callable[[str], bool]) -> Iterator[Path]:
        for entry in self._scan(directory):
            if is_ours(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)

    def _scan(self, directory: Path) -> Sequence[os.DirEntry[str]]:
        try:
            return sorted(os.scandir(directory), key=lambda entry: entry.name)
        except FileNotFoundError:
            return []
        except PermissionError as error:
            self.unreadable.append(f"{directory} ({error.strerror})")
            return []
