"""Frames of packs, read by several threads and unpacked into staging directories."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from ..cache_errors import CacheValidationError
from ..packs.manifest import Frame, PackedFile
from ..packs.pack import DamagedFrameError, Pack, read_frame
from ..space import no_room_is_an_interruption
from ..stores.interface import Store
from .missing import MissingFiles
from .readers import PackReaders
from .refused import Refused
from .staging import write_file

_DESCRIPTORS_PER_THREAD = 8  # a pack and a file are open at a time; the rest of the process has some, too


class FrameUnpacker:
    """Unpacks the missing files of a restore.

    A damaged frame counts as not there. So does a pack that cannot be read, or whose archive is not what its manifest
    says.

    Args:
        missing: the files to unpack.
        staging: name of a cache -> its staging directory, for every cache that ``missing`` names.
        directories: name of a cache -> where the files will be used.
        check: called before each frame; what it raises ends the unpacking.

    Attributes:
        refused: what was found damaged or unreadable.
        read_bytes: of frames.
    """

    def __init__(
        self,
        store: Store,
        missing: MissingFiles,
        staging: Mapping[str, Path],
        directories: Mapping[str, Path],
        check: Callable[[], None],
    ) -> None:
        self.refused = Refused()
        self.read_bytes = 0
        self._store = store
        self._missing = missing
        self._staging = staging
        self._directories = directories
        self._check = check
        self._lock = threading.Lock()

    def run(self, threads: int) -> list[tuple[Pack, PackedFile]]:
        """Unpack by so many threads (fewer where few files may be open); the files that were written.

        Raises:
            CacheOperationInterrupted: no room is left, or ``check`` raised it.
            OSError: a disk fails.
        """
        self._make_directories()
        work = self._missing.frames()
        with ExitStack() as stack:
            readers = stack.enter_context(PackReaders(self._store, [(pack, frame) for pack, frame, _ in work]))
            stack.enter_context(no_room_is_an_interruption(next(iter(self._staging.values())).parents[1]))
            pool = stack.enter_context(ThreadPoolExecutor(_fewer(threads), thread_name_prefix="compile-cache"))
            futures = [pool.submit(self._unpack, readers, *item) for item in work]
            try:
                written = [item for item, future in zip(work, futures, strict=True) if future.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.read_bytes = sum(frame.size for _, frame, _ in written)
        self._remove_refused(work)
        kept = [item for item in written if item[0].stored.name not in self.refused.packs]
        return [(pack, file) for pack, _, files in kept for file in files]

    def _make_directories(self) -> None:
        work = self._missing.frames()
        for directory in sorted({file.path.rpartition("/")[0] for _, _, files in work for file in files}):
            root, _, below = directory.partition("/")
            os.makedirs(self._staging[root] / below, mode=0o700, exist_ok=True)

    def _unpack(self, readers: PackReaders, pack: Pack, frame: Frame, files: list[PackedFile]) -> bool:
        """Whether the files of one frame were written; False when the frame or its pack is refused."""
        name = pack.stored.name
        location = f"{self._store.description}/{name}"
        with readers.reader(name) as reader:
            if name in self.refused.packs:
                return False
            self._check()
            try:
                content = read_frame(reader, frame, location)
            except DamagedFrameError as error:
                self.refused.frames.add((name, files[0].frame))
                self.refused.reasons.append(str(error))
                return False
            except FileNotFoundError:
                self.refused.gone = True
                self._refuse(name, "")
                return False
            except CacheValidationError as error:
                self._refuse(name, str(error))
                return False
            except OSError as error:
                self.refused.unreadable = True
                self._refuse(name, f"{location}: could not be read: {error}")
                return False
        try:
            for file in files:
                write_file(pack, file, content, self._staging[file.root], self._directories, location)
        except CacheValidationError as error:
            self._refuse(name, str(error))
            return False
        return True

    def _refuse(self, name: str, reason: str) -> None:
        with self._lock:
            if name not in self.refused.packs:
                self.refused.packs[name] = reason
                self.refused.reasons += [reason] if reason else []

    def _remove_refused(self, work: list[tuple[Pack, Frame, list[PackedFile]]]) -> None:
        """Remove what was written of refused packs, files of a frame that was refused halfway included."""
        for pack, _, files in work:
            if pack.stored.name in self.refused.packs:
                for file in files:
                    with suppress(OSError):
                        os.unlink(self._staging[file.root] / file.path.partition("/")[2])


def _fewer(threads: int) -> int:
    """So many threads as this process may open files for."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return threads if most == resource.RLIM_INFINITY else max(1, min(threads, most // _DESCRIPTORS_PER_THREAD))
