"""The compile cache on its way into the page cache, before an engine restores it: what is read of a store in a
directory by `engine-loader warm`, between what an engine opens and its weights.

What the last start restored is read, by the list that it has left; without one, the indexes of the store's keys, which
hold the manifests of their packs. The bytes are thrown away: the restore verifies them as ever.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ....compile_cache.store_reads import Reads
from ....compile_cache.stores.object_names import DENIED, INDEX, MARKER, is_environment, is_scope, kind_of
from ....home import home_expanded
from ....report.load_report import human_bytes
from ....settings import CompileCacheSettings, load_settings
from ....sources.registry import is_remote
from ....start.page_reading import READERS_OF_EACH, Budget, Ranges, WarmingEach
from .opened_last import opened_in_words, opened_last
from .restored_last import restored_last

MOST_MANIFEST_BYTES = 32 << 20
MOST_NEW_BYTES = 256 << 20
PATIENCE_S = 10.0
"""A store that gives no byte for so long is left alone."""
_LOOK_S = 0.2
_IN_AN_OBJECT_STORE = "it lies in an object store"


class WarmingStore(WarmingEach):
    """What a restore will read of a store, on its way into the page cache. A store that hangs is left after a while,
    with the threads that wait for it.

    Args:
        store: the directory, absolute; nothing above or beside it is read, nor through links in it.
        read: what was read of it last; empty: the indexes of the newest keys are.
        budget: how much may be in the page cache.
        passed_over: why nothing of it is read; "" where it is.

    Attributes:
        passed_over: why something, or all, was left; "" where nothing was.
    """

    readers = 1  # it has threads of its own, which are left alone where they hang

    def __init__(self, store: Path, read: Reads, budget: Budget, passed_over: str = "") -> None:
        self.passed_over = passed_over
        self._store = store
        self._last_read = read
        self._of_each: dict[str, Ranges] = {}
        super().__init__(self._paths_in_turn(), budget, self._of_each)

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read until there is no more, there is no room, ``stopped``, or nothing comes any more."""
        ended = threading.Event()
        read = super().run
        threads = [
            threading.Thread(target=read, args=(lambda: ended.is_set() or stopped(),), daemon=True)
            for _ in range(READERS_OF_EACH)
        ]
        for thread in threads:
            thread.start()
        seen, since = self._progress(), time.monotonic()
        while not stopped() and (left := [thread for thread in threads if thread.is_alive()]):
            left[0].join(_LOOK_S)
            now = self._progress()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                self.passed_over = f"{self._store} gave nothing for {PATIENCE_S:g} s"
                break
        ended.set()

    def add_up(self, seconds: float) -> None:
        """As that of ``WarmingEach``, with the reason why something was left."""
        super().add_up(seconds)
        failed = (one.reason for one in self._begun if one.reason not in ("", self.reason))
        self.passed_over = self.passed_over or next(failed, "")

    def _progress(self) -> tuple[int, int]:
        begun = list(self._begun)
        return len(begun), sum(one.read + one.resident for one in begun)

    def _paths_in_turn(self) -> Iterator[str]:
        """The files, each when it is its turn: looking for them may hang, too."""
        if self.passed_over:
            return
        try:
            real = os.path.realpath(self._store)
            if not stat.S_ISDIR(os.stat(real).st_mode):
                self.passed_over = f"{self._store} is no directory"
                return
            for name, ranges in self._last() if self._last_read else self._manifests():
                path = f"{real}/{name}"
                if os.path.realpath(path) == path and self._can_be_read(path):
                    if ranges:
                        self._of_each[path] = ranges
                    yield path
        except FileNotFoundError:
            return  # nothing was ever saved there
        except OSError as error:
            self.passed_over = f"{self._store}: {error.strerror}"

    def _can_be_read(self, path: str) -> bool:
        """Whether it is a file that can be opened; one that was pruned since is no reason to tell."""
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return False
            os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
        except FileNotFoundError:
            return False
        except OSError as error:
            self.passed_over = f"{path}: {error.strerror}"
            return False
        return True

    def _last(self) -> Iterator[tuple[str, Ranges]]:
        """What the last start read, and the packs that came since under the keys of which it read packs: a compaction
        has another name than what it replaces.
        """
        keys: dict[str, None] = {}
        for name, ranges in self._last_read.items():
            if ranges:
                yield name, ranges
                if kind_of(name) == "pack":
                    keys[name.rpartition("/")[0]] = None
        found = (f"{key}/{one.name}" for key in keys for one in _entries(self._store / key))
        new = (name for name in found if kind_of(name) == "pack" and name not in self._last_read)
        yield from self._newest(new, MOST_NEW_BYTES)

    def _manifests(self) -> Iterator[tuple[str, Ranges]]:
        """The marker, the deny-list, and the indexes of the keys."""
        yield MARKER, ()
        yield DENIED, ()
        environments = (one for one in _entries(self._store) if is_environment(one.name) and _is_directory(one))
        scopes = (two for one in environments for two in _entries(Path(one.path)) if is_scope(two.name))
        indexes = (Path(one.path, INDEX).relative_to(self._store).as_posix() for one in scopes if _is_directory(one))
        yield from self._newest(indexes, MOST_MANIFEST_BYTES)

    def _newest(self, names: Iterable[str], most_bytes: int) -> Iterator[tuple[str, Ranges]]:
        """Those files, whole, the newest first, as far as they have no more than so many bytes."""
        found = []
        for name in names:
            with suppress(FileNotFoundError):
                facts = os.lstat(self._store / name)
                found.append((facts.st_mtime, name, facts.st_size))
        for _, name, size in sorted(found, reverse=True):
            if size <= most_bytes:
                most_bytes -= size
                yield name, ()


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(directory))
    except FileNotFoundError:
        return []


def _is_directory(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def ahead_of_weights() -> list[WarmingEach]:
    """What is read before a model's weights, within one budget: what the last start opened, then what it restored."""
    budget = Budget()
    opened = opened_last()
    found = [WarmingEach(opened, budget)] if opened else []
    settings = load_settings().settings.compile_cache
    if settings.enabled:
        found += cache_ahead(settings, budget)
    return found


def cache_ahead(settings: CompileCacheSettings, budget: Budget) -> list[WarmingEach]:
    """The store that the settings name; none without a home, where theirs is in it."""
    if is_remote(settings.directory):
        return [WarmingStore(Path(settings.directory), {}, budget, _IN_AN_OBJECT_STORE)]
    with suppress(OSError):
        place = home_expanded(settings.directory).absolute()
        return [WarmingStore(place, restored_last(place), budget)]
    return []


def ahead_in_words(done: WarmingEach) -> str:
    """What became of it, in a line; "" where there is nothing to tell."""
    if not isinstance(done, WarmingStore):
        return opened_in_words(done)
    reason = done.reason or done.passed_over
    if not done.files:
        return f"compile cache: nothing is read into the page cache: {reason}" if reason else ""
    files = "1 file" if done.files == 1 else f"{done.files:,} files"
    text = f"compile cache: {files}, {human_bytes(done.read)} into the page cache in {done.seconds:.1f} s"
    if done.resident:
        text += f", {human_bytes(done.resident)} were there already"
    return f"{text}; the rest was left: {reason}" if reason else text
