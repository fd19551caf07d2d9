"""Restored files on trial: from a restore until the engine that uses them is ready.

A cache may be validly signed and yet end the engine: an instruction that this CPU lacks, a library that is missing. A
marker in the state directory names the files that a restore brings. The engine removes it when it is ready. Found with
its engine dead, those files are set aside, so that the next start is one without them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..directories import STATE
from ..packs.manifest import PackedFile
from ..packs.pack import Pack
from ..packs.relocate import is_group_file
from ..trust import make_private
from .leftovers import SUSPECT
from .locks import NodeLock

_TRIAL = "trial-"


@dataclass(frozen=True)
class EngineProcess:
    """A process that starts an engine; a number alone would be given to another one later.

    Attributes:
        started: clock ticks between the boot and its start; 0 where that is not known.
        boot: identity of the boot.
    """

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> EngineProcess:
        """The process that has this number now."""
        return cls(pid, _started(pid), _boot())

    def is_running(self) -> bool:
        return self.boot == _boot() and self.started == _started(self.pid) != 0


@dataclass
class Trial:
    """What a restore brought for an engine that has yet to become ready.

    Attributes:
        key: prefix of the key.
        packs: names of the packs that the files are of.
        files: [path as in packs, size, mtime in ns, SHA-256] each; the size is -1 where the file was rewritten for its
            place, and its digest says nothing.
    """

    key: str
    engine: EngineProcess
    packs: list[str] = field(default_factory=list)
    files: list[tuple[str, int, int, str]] = field(default_factory=list)
    marker: Path = field(default=Path(), compare=False)

    def add(self, files: Iterable[tuple[Pack, PackedFile]]) -> None:
        """Count files as on trial, and write the marker before any compiler can see them."""
        for pack, file in files:
            if pack.stored.name not in self.packs:
                self.packs.append(pack.stored.name)
            size, digest = (-1, "") if is_group_file(file.path) else (file.size, file.sha256)
            self.files.append((file.path, size, file.mtime_ns, digest))
        if self.files:
            self._write()

    def _write(self) -> None:
        make_private(self.marker.parent)
        value = asdict(self)
        del value["marker"]
        unfinished = self.marker.with_name(f"{self.marker.name}.tmp")
        unfinished.write_text(json.dumps(value))
        unfinished.replace(self.marker)

    def set_aside(self, directories: Mapping[str, Path]) -> int:
        """Move the files that are as they were restored out of their caches, into the state directories; how many.

        Args:
            directories: name of a cache -> its directory.
        """
        when = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        moved = [self._move(row, directories, when) for row in self.files]
        return sum(moved)

    def clear(self) -> None:
        """Remove the marker: the trial is over."""
        _clear(self.marker)

    def _move(self, row: tuple[str, int, int, str], directories: Mapping[str, Path], when: str) -> bool:
        root, _, below = row[0].partition("/")
        if root not in directories:
            return False
        path = directories[root] / below
        target = directories[root] / STATE / f"{SUSPECT}{when}" / below
        try:
            if not _is_as_restored(path, row):
                return False
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.move(path, target)  # by way of a link it may lie on another file system
        except OSError:
            return False
        with suppress(OSError):  # a compiler may take an empty directory for a cache
            for parent in path.parents:
                if parent == directories[root]:
                    break
                parent.rmdir()
        return True


def begin_trial(home: Path, key: str, pid: int, since_ns: int) -> Trial:
    """A trial of the engine that the process ``pid`` starts.

    Args:
        home: the cache whose state directory holds the marker.
        since_ns: when the start began, which identifies it on this node.
    """
    return Trial(key, EngineProcess.of(pid), marker=_marker(home, since_ns))


def end_trial(home: Path, since_ns: int) -> None:
    """The engine is ready, or was told to stop: what was restored for it is no suspect."""
    with suppress(OSError):
        _clear(_marker(home, since_ns))


def engine_lock(home: Path, since_ns: int) -> NodeLock:
    """Held by an engine while it starts: a process's number says nothing to another container of the node."""
    return NodeLock(home, f"{_TRIAL}{since_ns}")


def failed_trials(home: Path) -> list[Trial]:
    """Trials whose engines ended before they were ready."""
    found = []
    for path in sorted((home / STATE).glob(f"{_TRIAL}*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            value = json.loads(path.read_text())
            engine = EngineProcess(**value["engine"])
            if not engine.is_running() and _is_free(home, path):
                rows = [(str(file), int(size), int(mtime), str(sha)) for file, size, mtime, sha in value["files"]]
                found.append(Trial(str(value["key"]), engine, list(map(str, value["packs"])), rows, path))
    return found


def others_start(home: Path, since_ns: int) -> bool:
    """Whether another engine than the one whose start began at ``since_ns`` starts on this node now."""
    locks = (home / STATE).glob(f"{_TRIAL}*.lock")
    return any(path.stem != f"{_TRIAL}{since_ns}" and not _is_free(home, path) for path in locks)


def _is_free(home: Path, marker: Path) -> bool:
    lock = NodeLock(home, marker.stem)
    taken = lock.acquire(0)
    lock.release()
    return taken


def _clear(marker: Path) -> None:
    for path in (marker, marker.with_suffix(".lock")):
        path.unlink(missing_ok=True)


def _marker(home: Path, since_ns: int) -> Path:
    return home / STATE / f"{_TRIAL}{since_ns}.json"


def _is_as_restored(path: Path, row: tuple[str, int, int, str]) -> bool:
    _, size, mtime_ns, sha256 = row
    facts = path.lstat()
    if not sha256 and size == 0:
        return path.is_symlink()
    if facts.st_mtime_ns != mtime_ns:
        return False
    if size < 0:
        return True
    with path.open("rb") as file:
        return facts.st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _started(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])  # a zombie has ended


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
