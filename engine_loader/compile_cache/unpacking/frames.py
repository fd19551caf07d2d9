"""Frames of packs, read by several threads and unpacked into staging directories."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from ..cache_errors import CacheValidationError
from ..packs.manifest import Frame, PackedFile
from ..packs.pack import Pack, open_pack, read_frame
from ..space import no_room_is_an_interruption
from ..stores.interface import Readable, Store
from .missing import MissingFiles
from .staging import write_file


class FrameUnpacker:
    """Unpacks the missing files of a restore. A pack with a damaged frame counts as not there.

    Args:
        missing: the files to unpack.
        staging: name of a cache -> its staging directory, for every cache that ``missing`` names.
        directories: name of a cache -> where the files will be used.
        check: called before each frame; what it raises ends the unpacking.

    Attributes:
        messages: one for each pack that was refused.
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
        self.messages: list[str] = []
        self.read_bytes = 0
        self._store = store
        self._missing = missing
        self._staging = staging
        self._directories = directories
        self._check = check
        self._readers: dict[str, Readable] = {}
        self._refused: dict[str, str] = {}

    def run(self, threads: int) -> list[PackedFile]:
        """Unpack by so many threads; the files that were written.

        Raises:
            CacheOperationInterrupted: no room is left, or ``check`` raised it.
            OSError: the store or a disk fails.
        """
        self._make_directories()
        written: dict[str, list[PackedFile]] = defaultdict(list)
        with ExitStack() as stack:
            for name in self._missing.packs:
                self._readers[name] = reader = stack.enter_context(open_pack(self._store, self._missing.packs[name]))
                frames = self._missing.packs[name].manifest.frames
                reader.expect([(frames[index].offset, frames[index].size) for index in self._missing.files[name]])
            stack.enter_context(no_room_is_an_interruption(next(iter(self._staging.values())).parents[1]))
            pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="compile-cache"))
            work = self._missing.frames()
            futures = [pool.submit(self._unpack, *item) for item in work]
            try:
                for (pack, frame, files), future in zip(work, futures, strict=True):
                    if future.result():
                        written[pack.stored.name] += files
                        self.read_bytes += frame.size
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                self.messages += self._refused.values()
        for name in self._refused:
            written.pop(name, None)
            self._remove(name)
        return [file for files in written.values() for file in files]

    def _make_directories(self) -> None:
        work = self._missing.frames()
        for directory in sorted({os.path.dirname(file.path) for _, _, files in work for file in files}):
            root, _, below = directory.partition("/")
            os.makedirs(self._staging[root] / below, mode=0o700, exist_ok=True)

    def _unpack(self, pack: Pack, frame: Frame, files: list[PackedFile]) -> bool:
        """Whether the files of one frame were written; False when their pack is refused."""
        name = pack.stored.name
        if name in self._refused:
            return False
        self._check()
        location = f"{self._store.description}/{name}"
        try:
            content = read_frame(self._readers[name], frame, location)
            for file in files:
                write_file(pack, file, content, self._staging[file.root], self._directories, location)
        except CacheValidationError as error:
            self._refused.setdefault(name, str(error))
            return False
        return True

    def _remove(self, name: str) -> None:
        """Remove what was written of a pack, files of a frame that was refused halfway included."""
        for file in (file for files in self._missing.files[name].values() for file in files):
            with suppress(OSError):
                os.unlink(self._staging[file.root] / file.path.partition("/")[2])
