"""A restore: every pack of a key that can be trusted, unpacked beside the local caches and renamed into them.

What is already there stays as it is: a compiler may be using it. No process sees half a file.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from ...report.events import recorder
from ...report.phases import RESTORE_LIST, RESTORE_UNPACK
from ..cache_errors import CacheOperationInterrupted, CacheValidationError
from ..key import CacheKey
from ..ownership import Access
from ..packs.key_packs import files_for, for_this_host, of_other_hosts, read_key
from ..packs.manifest import PackedFile
from ..packs.pack import Pack
from ..space import Floor
from ..stores.interface import Store, Stored
from ..trust import Trust
from ..unpacking.frames import FrameUnpacker
from ..unpacking.missing import MissingFiles, missing_files
from ..unpacking.rank_sets import Layout, leave_out_partial_sets, parts_of_broken_sets, sets_of
from ..unpacking.refused import Refused
from ..unpacking.staging import make_staging, move_into_place
from .outcome import Outcome, Status

_STRICT = Access()


class Restore:
    """Brings what a store has for a key into the local caches.

    Args:
        directories: name of a cache -> its directory on this node.
        layout: of the engine; without it, files that ranks compare with one another are left out.
        threads: that decompress.
        least_free_bytes: left free on every local disk.
        may_go_on: asked before each frame and each rename.
        before_move: called with files, each with its pack, that are complete and about to be seen by compilers.
        access: into which directories of the local caches files are put.

    Attributes:
        packs: that were found.
        entries: everything that the store has of the key.
        refused: what of them is damaged or could not be read.
        left_alone: caches and places in them into which nothing was put, and why.
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
        before_move: Callable[[list[tuple[Pack, PackedFile]]], None] = lambda _: None,
        access: Access = _STRICT,
    ) -> None:
        self.packs: list[Pack] = []
        self.entries: list[Stored] = []
        self.refused = Refused()
        self.left_alone: list[str] = []
        self._store = store
        self._key = key
        self._directories = directories
        self._trust = trust
        self._layout = layout
        self._threads = threads
        self._least_free_bytes = least_free_bytes
        self._may_go_on = may_go_on
        self._before_move = before_move
        self._access = access
        self._outcome = Outcome("nothing")

    def run(self) -> Outcome:
        """Restore.

        What is damaged or cannot be read is left out, and older copies of its files are taken where there are any.

        Raises:
            CacheOperationInterrupted: a disk would be filled, or ``may_go_on`` returned False; the files that were
                unpacked are removed.
            OSError: the store cannot be listed, or a disk fails.
        """
        began = time.monotonic()
        outcome = self._outcome
        with recorder.span(RESTORE_LIST):
            outcome.messages += self._read()
        if not self.packs:
            outcome.status = "refused" if outcome.messages else "nothing"
            return outcome
        self._note_other_hosts()
        missing = self._missing()
        while missing.count:
            with recorder.span(RESTORE_UNPACK, files=missing.count, bytes=missing.bytes):
                refused = self._unpack(missing)
            self.refused.add(refused)
            if not refused:
                break
            if refused.gone:  # a compaction has replaced it: read that one
                self._read()
            missing = self._missing()
        outcome.messages += self.refused.messages()
        outcome.status = self._status(missing)
        outcome.packs = len(self.packs)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _read(self) -> list[str]:
        """Read what the store has; what there is to tell of it."""
        try:
            found = read_key(self._store, self._key.prefix, self._trust)
        except CacheValidationError as error:
            return [str(error)]
        self.packs, self.entries = found.packs, found.entries
        return found.messages()

    def _missing(self) -> MissingFiles:
        """What this host lacks of the packs, less what only some ranks of the engine would find."""
        packs = for_this_host(self.refused.usable(self.packs), self._key)
        missing = missing_files(packs, self._directories, self.refused.frames)
        files = files_for(packs, without=self.refused.frames)
        missing, partial = leave_out_partial_sets(missing, files, self._directories, self._layout)
        self._tell(partial)
        # Older copies would stand beside parts of another measurement.
        broken = sets_of(file for pack in self.packs for file in self.refused.files(pack))
        return missing.where(lambda file: sets_of([file]).isdisjoint(broken)) if broken else missing

    def _note_other_hosts(self) -> None:
        """Say which facts keep files from being used here."""
        if not any(pack.manifest.hosts for pack in self.packs):
            return
        count, group = of_other_hosts(self.packs, self._key.host_groups)
        here = next((own for own in self._key.host_groups.values() if group and own.names == group.names), None)
        if group is not None and here is not None:
            self._outcome.notes.append(
                f"{count} files are left out: they hold code for other hosts ({'; '.join(here.differs_from(group))})"
            )

    def _status(self, missing: MissingFiles) -> Status:
        if self._outcome.files:
            return "restored"
        if self.refused.unreadable:
            return "failed"
        if self.refused.reasons or missing.count:
            return "refused"
        return "nothing" if self.refused else "complete"

    def _unpack(self, missing: MissingFiles) -> Refused:
        """Unpack the files into staging directories, and rename them into the caches; what was refused of it."""
        with ExitStack() as stack:
            staging = self._stage(missing, stack)
            missing = missing.below(staging)
            if not missing.count:
                return Refused()
            floors = self._floors(staging)
            for floor in floors:
                floor.check(missing.bytes)

            def check() -> None:
                self._check_wanted()
                for floor in floors:
                    floor.check()

            unpacker = FrameUnpacker(self._store, missing, staging, self._directories, check)
            done = self._whole_sets(missing, unpacker.run(self._threads), staging)
            self._outcome.pack_bytes += unpacker.read_bytes
            self._before_move(done)
            left: dict[str, str] = {}
            for name, path in staging.items():
                self._check_wanted()
                left |= move_into_place(path, self._directories[name], self._access)
            self._leave([f"{path}: {reason}" for path, reason in left.items()])
            placed = [file for _, file in done if not self._is_left(file, left)]
            self._outcome.files += len(placed)
            self._outcome.bytes += sum(file.size for file in placed)
            return unpacker.refused

    def _is_left(self, file: PackedFile, left: Mapping[str, str]) -> bool:
        """Whether a file is one of those ``left`` alone, or lies below one."""
        if not left:
            return False
        path = f"{self._directories[file.root]}/{file.path.partition('/')[2]}"
        return any(path == other or path.startswith(f"{other}/") for other in left)

    def _whole_sets(
        self, missing: MissingFiles, done: list[tuple[Pack, PackedFile]], staging: Mapping[str, Path]
    ) -> list[tuple[Pack, PackedFile]]:
        """``done`` less the parts of sets of which something was refused, which are removed from ``staging``."""
        wanted = [file for frames in missing.files.values() for files in frames.values() for file in files]
        broken = parts_of_broken_sets(wanted, [file for _, file in done])
        for file in broken:
            (staging[file.root] / file.path.partition("/")[2]).unlink()
        if broken:
            self._outcome.messages.append(f"{len(broken)} autotune tables are left out with those that were refused")
        return [(pack, file) for pack, file in done if file not in broken]

    def _stage(self, missing: MissingFiles, stack: ExitStack) -> dict[str, Path]:
        """Name of a cache -> a staging directory, removed with ``stack``. A cache that is refused is left out."""
        staging: dict[str, Path] = {}
        for name in missing.roots():
            try:
                staging[name] = make_staging(self._directories[name], self._access, name=name)
            except (CacheValidationError, OSError) as error:
                self._leave([f"the cache {name} is left alone: {error}"])
            else:
                stack.callback(shutil.rmtree, staging[name], ignore_errors=True)
        return staging

    def _leave(self, messages: list[str]) -> None:
        self._tell(messages)
        self.left_alone += [message for message in messages if message not in self.left_alone]

    def _tell(self, messages: list[str]) -> None:
        """Tell each once, however often it was planned."""
        self._outcome.messages += [message for message in messages if message not in self._outcome.messages]

    def _floors(self, staging: Mapping[str, Path]) -> list[Floor]:
        return [
            Floor(path, self._least_free_bytes, "compile_cache.min_local_free_bytes")
            for path in {self._directories[name] for name in staging}
        ]

    def _check_wanted(self) -> None:
        if not self._may_go_on():
            raise CacheOperationInterrupted("the restore was given up: the engine did not wait any longer")
