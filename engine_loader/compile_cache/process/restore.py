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
from ..packs.key_packs import effective_files, for_this_host, of_other_hosts, read_packs
from ..packs.manifest import PackedFile
from ..packs.pack import Pack
from ..space import Floor
from ..stores.interface import Store
from ..trust import Trust
from ..unpacking.frames import FrameUnpacker
from ..unpacking.missing import MissingFiles, missing_files
from ..unpacking.rank_sets import Layout, leave_out_partial_sets, parts_of_broken_sets
from ..unpacking.staging import make_staging, move_into_place
from .outcome import Outcome


class Restore:
    """Brings what a store has for a key into the local caches.

    Args:
        directories: name of a cache -> its directory on this node.
        layout: of the engine; without it, files that ranks compare with one another are left out.
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
        layout: Layout | None = None,
        threads: int,
        least_free_bytes: int = 0,
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._key = key
        self._directories = directories
        self._trust = trust
        self._layout = layout
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
        self._note_other_hosts(packs)
        missing = self._missing(packs, outcome.messages)
        if missing.count:
            for _ in range(2):
                try:
                    self._unpack(missing)
                    break
                except FileNotFoundError:  # a pack was deleted since it was listed: read the one that replaced it
                    packs = read_packs(self._store, self._key, self._trust, [])
                    missing = self._missing(packs, [])
        outcome.status = "restored" if outcome.files else "refused" if missing.count else "complete"
        outcome.packs = len(packs)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _missing(self, packs: list[Pack], messages: list[str]) -> MissingFiles:
        """What this host lacks of ``packs``, less what only some ranks of the engine would find."""
        packs = for_this_host(packs, self._key)
        missing = missing_files(packs, self._directories)
        missing, partial = leave_out_partial_sets(missing, effective_files(packs), self._directories, self._layout)
        messages += partial
        return missing

    def _note_other_hosts(self, packs: list[Pack]) -> None:
        """Say which facts keep files from being used here."""
        if not any(pack.manifest.hosts for pack in packs):
            return
        count, group = of_other_hosts(packs, self._key.host_groups)
        here = next((own for own in self._key.host_groups.values() if group and own.names == group.names), None)
        if group is not None and here is not None:
            self._outcome.notes.append(
                f"{count} files are left out: they hold code for other hosts ({'; '.join(here.differs_from(group))})"
            )

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
            done = self._whole_sets(missing, done, staging)
            for name, path in staging.items():
                self._check_wanted()
                move_into_place(path, self._directories[name])
            self._outcome.files += len(done)
            self._outcome.bytes += sum(file.size for file in done)

    def _whole_sets(
        self, missing: MissingFiles, done: list[PackedFile], staging: Mapping[str, Path]
    ) -> list[PackedFile]:
        """``done`` less the parts of sets of which something was refused, which are removed from ``staging``."""
        wanted = [file for frames in missing.files.values() for files in frames.values() for file in files]
        broken = parts_of_broken_sets(wanted, done)
        for file in broken:
            (staging[file.root] / file.path.partition("/")[2]).unlink()
        if broken:
            self._outcome.messages.append(f"{len(broken)} autotune tables are left out with those that were refused")
        return [file for file in done if file not in broken]

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
