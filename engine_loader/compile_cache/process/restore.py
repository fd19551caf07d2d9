"""A restore: every pack of a key that can be trusted, unpacked beside the local caches and renamed into them.

What is already there stays as it is: a compiler may be using it. No process sees half a file.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from ..cache_errors import CacheOperationInterrupted, CacheValidationError
from ..key import CacheKey
from ..packs.key_packs import read_packs
from ..space import Floor
from ..stores.interface import Store
from ..trust import Trust
from ..unpacking.frames import FrameUnpacker
from ..unpacking.missing import MissingFiles, missing_files
from ..unpacking.staging import make_staging, move_into_place
from .outcome import Outcome


class Restore:
    """Brings what a store has for a key into the local caches.

    Args:
        directories: name of a cache -> its directory on this node.
        threads: that decompress.
        least_free_bytes: left free on every local disk.
        may_go_on: asked before each frame and each rename.
    """

    def __init__(
        self,
        store: Store,
        key: CacheKey,
        directories: Mapping[str, Path],
        trust: Trust,
        *,
        threads: int,
        least_free_bytes: int = 0,
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._key = key
        self._directories = directories
        self._trust = trust
        self._threads = threads
        self._least_free_bytes = least_free_bytes
        self._may_go_on = may_go_on
        self._outcome = Outcome("nothing")

    def run(self) -> Outcome:
        """Restore.

        Raises:
            CacheOperationInterrupted: a disk would be filled, or ``may_go_on`` returned False; the files that were
                unpacked are removed.
            OSError: the store or a disk fails.
        """
        began = time.monotonic()
        outcome = self._outcome
        packs = read_packs(self._store, self._key, self._trust, outcome.messages)
        if not packs:
            outcome.status = "refused" if outcome.messages else "nothing"
            return outcome
        missing = missing_files(packs, self._directories)
        if missing.count:
            for _ in range(2):
                try:
                    self._unpack(missing)
                    break
                except FileNotFoundError:  # a pack was deleted since it was listed: read the one that replaced it
                    packs = read_packs(self._store, self._key, self._trust, [])
                    missing = missing_files(packs, self._directories)
        outcome.status = "restored" if outcome.files else "refused" if missing.count else "complete"
        outcome.packs = len(packs)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _unpack(self, missing: MissingFiles) -> None:
        """Unpack the files into staging directories, and rename them into the caches."""
        with ExitStack() as stack:
            staging = self._stage(missing, stack)
            missing = missing.below(staging)
            if not missing.count:
                return
            floors = self._floors(staging)
            for floor in floors:
                floor.check(missing.bytes)

            def check() -> None:
                self._check_wanted()
                for floor in floors:
                    floor.check()

            unpacker = FrameUnpacker(self._store, missing, staging, self._directories, check)
            try:
                done = unpacker.run(self._threads)
            finally:
                self._outcome.messages += unpacker.messages
                self._outcome.pack_bytes += unpacker.read_bytes
            for name, path in staging.items():
                self._check_wanted()
                move_into_place(path, self._directories[name])
            self._outcome.files += len(done)
            self._outcome.bytes += sum(file.size for file in done)

    def _stage(self, missing: MissingFiles, stack: ExitStack) -> dict[str, Path]:
        """Name of a cache -> a staging directory, removed with ``stack``. A cache that is refused is left out."""
        staging: dict[str, Path] = {}
        for name in missing.roots():
            try:
                staging[name] = make_staging(self._directories[name])
            except (CacheValidationError, OSError) as error:
                self._outcome.messages.append(f"the cache {name} is left alone: {error}")
            else:
                stack.callback(shutil.rmtree, staging[name], ignore_errors=True)
        return staging

    def _floors(self, staging: Mapping[str, Path]) -> list[Floor]:
        return [
            Floor(path, self._least_free_bytes, "compile_cache.min_local_free_bytes")
            for path in {self._directories[name] for name in staging}
        ]

    def _check_wanted(self) -> None:
        if not self._may_go_on():
            raise CacheOperationInterrupted("the restore was given up: the engine did not wait any longer")
