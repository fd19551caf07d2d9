"""A restore: every pack of a key that can be trusted, unpacked beside the local caches and renamed into them.

What is already there stays as it is: a compiler may be using it. Nobody sees half a file.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..cache_errors import CacheOperationInterrupted, CacheValidationError
from ..directories import STATE
from ..key import CacheKey
from ..packs.key_packs import effective_files, read_packs
from ..packs.manifest import Frame, PackedFile
from ..packs.pack import Pack, read_frame
from ..packs.relocate import is_group_file, relocated
from ..space import Floor, no_room_is_an_interruption
from ..stores.interface import Readable, Store
from ..trust import Trust, check_private, make_private
from .outcome import Outcome

STAGING = "restore-"


@dataclass
class _Plan:
    """What is missing here, by pack and frame."""

    files: dict[str, dict[int, list[PackedFile]]] = field(default_factory=dict)
    packs: dict[str, Pack] = field(default_factory=dict)
    count: int = 0
    bytes: int = 0

    def add(self, pack: Pack, file: PackedFile) -> None:
        name = pack.stored.name
        self.packs[name] = pack
        self.files.setdefault(name, defaultdict(list))[file.frame].append(file)
        self.count += 1
        self.bytes += file.size

    def roots(self) -> list[str]:
        """The caches that something is missing in."""
        return sorted({file.root for frames in self.files.values() for files in frames.values() for file in files})

    def below(self, roots: Collection[str]) -> _Plan:
        """What of it belongs to ``roots``."""
        left = _Plan()
        for name, frames in self.files.items():
            for file in (file for files in frames.values() for file in files if file.root in roots):
                left.add(self.packs[name], file)
        return left

    def frames(self) -> list[tuple[Pack, Frame, list[PackedFile]]]:
        """The largest first, so that no thread is left with one at the end."""
        found = [
            (self.packs[name], self.packs[name].manifest.frames[index], files)
            for name, frames in self.files.items()
            for index, files in frames.items()
        ]
        return sorted(found, key=lambda item: item[1].raw_size, reverse=True)


def restore(
    store: Store,
    key: CacheKey,
    directories: Mapping[str, Path],
    trust: Trust,
    *,
    threads: int,
    least_free_bytes: int = 0,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Bring what the store has for ``key`` into ``directories`` (name of a cache -> where it is here).

    Raises:
        CacheOperationInterrupted: a disk would be filled, or ``may_go_on`` said no; nothing half-done is left.
        OSError: the store or a disk fails.
    """
    began = time.monotonic()
    outcome = Outcome("nothing")
    packs = read_packs(store, key, trust, outcome.messages)
    if not packs:
        outcome.status = "refused" if outcome.messages else "nothing"
        return outcome
    plan = _missing(packs, directories)
    if plan.count:
        for _ in range(2):  # a compaction may delete a pack in between: what replaced it is read then
            try:
                _unpack(plan, store, directories, threads, least_free_bytes, may_go_on, outcome)
                break
            except FileNotFoundError:
                packs = read_packs(store, key, trust, [])
                plan = _missing(packs, directories)
    outcome.status = "restored" if outcome.files else "refused" if plan.count else "complete"
    outcome.packs = len(packs)
    outcome.seconds = time.monotonic() - began
    return outcome


def _missing(packs: list[Pack], directories: Mapping[str, Path]) -> _Plan:
    plan = _Plan()
    for pack, file in effective_files(packs).values():
        root = directories.get(file.root)
        if root is not None and not os.path.lexists(root / file.path.partition("/")[2]):
            plan.add(pack, file)
    return plan


def _unpack(
    plan: _Plan,
    store: Store,
    directories: Mapping[str, Path],
    threads: int,
    least_free_bytes: int,
    may_go_on: Callable[[], bool],
    outcome: Outcome,
) -> None:
    staging: dict[str, Path] = {}
    try:
        for name in plan.roots():
            try:
                staging[name] = _stage(directories[name])
            except (CacheValidationError, OSError) as error:  # the other caches can still be used
                outcome.messages.append(f"the cache {name} is left alone: {error}")
        plan = plan.below(staging)
        if not plan.count:
            return
        needed = {name: directories[name] for name in staging}
        floors = [Floor(path, least_free_bytes, "compile_cache.min_local_free_bytes") for path in set(needed.values())]
        for floor in floors:
            floor.check(plan.bytes)
        done = _unpack_frames(plan, store, directories, staging, threads, floors, may_go_on, outcome)
        for name, path in staging.items():
            if not may_go_on():
                raise CacheOperationInterrupted("the restore was given up: the engine did not wait any longer")
            _move_into_place(path, needed[name])
        outcome.files += len(done)
        outcome.bytes += sum(file.size for file in done)
    finally:
        for path in staging.values():
            shutil.rmtree(path, ignore_errors=True)


def _stage(directory: Path) -> Path:
    """A new directory on the file system of the cache that is to be filled."""
    for place in (directory, directory / STATE):
        make_private(place)
        check_private(place)
    path = directory / STATE / f"{STAGING}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path.mkdir(mode=0o700)
    return path


def _unpack_frames(
    plan: _Plan,
    store: Store,
    directories: Mapping[str, Path],
    staging: Mapping[str, Path],
    threads: int,
    floors: list[Floor],
    may_go_on: Callable[[], bool],
    outcome: Outcome,
) -> list[PackedFile]:
    """Unpack into the staging directories; a pack with a bad frame counts as not there."""
    work = plan.frames()
    refused: set[str] = set()
    written: dict[str, list[PackedFile]] = defaultdict(list)
    for directory in sorted({os.path.dirname(file.path) for _, _, files in work for file in files}):
        root, _, below = directory.partition("/")
        os.makedirs(staging[root] / below, mode=0o700, exist_ok=True)
    opened = {name: store.open(name) for name in plan.packs}
    readers: dict[str, Readable] = {}

    def unpack(item: tuple[Pack, Frame, list[PackedFile]]) -> None:
        pack, frame, files = item
        name = pack.stored.name
        if name in refused:
            return
        if not may_go_on():
            raise CacheOperationInterrupted("the restore was given up: the engine did not wait any longer")
        for floor in floors:
            floor.check()
        place = f"{store.description}/{name}"
        try:
            content = read_frame(readers[name], frame, place)
            for file in files:
                _write(file, content, staging[file.root], pack.manifest.roots, directories, place)
        except CacheValidationError as error:
            if name not in refused:
                refused.add(name)
                outcome.messages.append(str(error))
            return
        written[name] += files
        outcome.pack_bytes += frame.size

    try:
        for name, pack in opened.items():
            readers[name] = pack.__enter__()
        with (
            no_room_is_an_interruption(next(iter(staging.values())).parents[1]),
            ThreadPoolExecutor(threads, thread_name_prefix="compile-cache") as pool,
        ):
            futures = [pool.submit(unpack, item) for item in work]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        for name in readers:
            opened[name].__exit__(None, None, None)
    for name in refused:
        for file in written.pop(name, []):
            root, _, below = file.path.partition("/")
            with suppress(OSError):
                os.unlink(staging[root] / below)
    return [file for files in written.values() for file in files]


def _write(
    file: PackedFile,
    content: bytes,
    staging: Path,
    roots: Mapping[str, str],
    directories: Mapping[str, Path],
    place: str,
) -> None:
    head = file.head()
    begin = file.offset + len(head)
    if content[file.offset : begin] != head:
        raise CacheValidationError(
            f"{place}: refused: the archive says something else of {file.path!r} than the manifest"
        )
    target = os.path.join(staging, file.path.partition("/")[2])
    if file.link:
        os.symlink(file.link, target)
        return
    data: memoryview | bytes = memoryview(content)[begin : begin + file.size]
    if is_group_file(file.path):
        data = relocated(bytes(data), roots, directories)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fchmod(descriptor, file.mode & 0o755 | 0o600)
        os.utime(descriptor, ns=(file.mtime_ns, file.mtime_ns))
    finally:
        os.close(descriptor)


def _move_into_place(source: Path, target: Path) -> None:
    """Rename whole directories where there is none yet, else file by file; what exists is never touched."""
    for entry in os.scandir(source):
        destination = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            if not os.path.lexists(destination):
                try:
                    os.rename(entry.path, destination)
                    continue
                except OSError as error:  # somebody else made it in between
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
            if os.path.isdir(destination) and not os.path.islink(destination):
                _move_into_place(Path(entry.path), destination)
        else:
            with suppress(FileExistsError):
                _rename_new(entry.path, destination)


def _rename_new(source: str, destination: Path) -> None:
    """Rename that fails where something is. (A hard link is the only such call that every kernel has.)"""
    try:
        os.link(source, destination, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(destination):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination)) from None
        os.rename(source, destination)
