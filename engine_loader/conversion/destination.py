"""The directory that a conversion writes: complete under its name, or not there.

What is written stands in a directory of its own until then: beside the destination, or, where the destination cannot be
renamed (the root of a mounted volume, an empty directory below one that this user may not write), within it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError
from ..formats.dcp_parts import METADATA_NAME
from ..formats.hf_index import INDEX_NAME
from ..loading.find import NoCheckpointError, ShardedState, find_checkpoint
from ..loading.open_store import open_store
from ..machine import mount_of, sync_directory
from ..report.load_report import human_bytes
from ..settings import LoaderSettings
from ..sources.posix import PosixSource
from ..sources.registry import is_remote
from .exchange import exchange

_UNFINISHED = "unfinished-"
_REPLACED = "replaced-"
_WITHIN = ".engine-loader-"
_OF_VOLUMES = frozenset({"lost+found", ".snapshot", ".snapshots", ".Trash-0"})
"""What file systems and storage servers keep in the root of a volume."""
_LEFT_OVER_S = 600.0
_LAST = (INDEX_NAME, METADATA_NAME, "config.json")
"""The names by which a directory is taken for a checkpoint."""


def check_destination(source: str, destination: str, *, overwrite: bool | None) -> None:
    """Refuse what cannot or should not be written to.

    Args:
        source: what is read.
        destination: a path.
        overwrite: whether a checkpoint is replaced that is there; None: the caller has no such choice.

    Raises:
        CheckpointError: it is in an object store, is the source or around it, is a file, or holds something that is not
            to be overwritten, or that is no checkpoint.
    """
    if is_remote(destination):
        raise CheckpointError(
            "a conversion is written to a directory", file=destination, hint="convert to a disk and upload the result"
        )
    target = Path(destination).resolve()
    if not is_remote(source) and (Path(source).resolve() == target or target in Path(source).resolve().parents):
        raise CheckpointError("source and destination are one, or one within the other", file=destination)
    _put_back(target)
    if not os.path.lexists(target):
        return
    if not os.path.isdir(target):
        raise CheckpointError("this is a file, not a directory", file=destination)
    try:
        names = _content(target)
    except OSError as error:
        raise CheckpointError(f"the destination cannot be listed: {error.strerror}", file=destination) from None
    if not names:
        return
    if not overwrite:
        raise CheckpointError(
            "the destination holds something",
            file=destination,
            hint="name a directory that is new or empty" + ("" if overwrite is None else ", or use --overwrite"),
        )
    if reason := _no_checkpoint(target, names):
        raise CheckpointError(
            f"this is not overwritten, because {reason}",
            file=destination,
            hint="name a new directory, or delete it yourself",
        )
    if _is_fixed(target):
        raise CheckpointError(
            "this is the root of a mounted volume, or lies in a directory that cannot be written: what it holds cannot "
            "be exchanged at once",
            file=destination,
            hint="name a directory below it, or empty it first",
        )


@contextmanager
def unfinished_directory(destination: str, nbytes: int) -> Iterator[Path]:
    """A directory beside or within the destination, which takes its place at the end; on any error it is deleted.

    What the destination held is deleted when the new one has its name. Modes are what the umask leaves, or those of an
    existing destination.

    Args:
        destination: its path.
        nbytes: what will be written, at least.

    Raises:
        CheckpointError: there is no room for it, or something cannot be written.
    """
    target = Path(destination).resolve()
    within = os.path.isdir(target) and not _content(target) and _is_fixed(target)
    home = target if within else target.parent
    prefix = _WITHIN if within else f".{target.name}-"
    unfinished: Path | None = None
    try:
        try:
            home.mkdir(parents=True, exist_ok=True)
            _clear_left_over(home, f"{prefix}{_UNFINISHED}")
            if os.path.lexists(target):
                _clear_left_over(home, f"{prefix}{_REPLACED}")
            free = shutil.disk_usage(home).free
            if free < nbytes:
                raise CheckpointError(
                    f"it takes {human_bytes(nbytes)}, and {human_bytes(free)} are free there", file=destination
                )
            unfinished = _new_directory(home, f"{prefix}{_UNFINISHED}")
        except OSError as error:
            raise _cannot_write(error, destination) from error
        with _held(unfinished):
            yield unfinished
            sync_directory(unfinished)
            if within:
                _move_in(unfinished, target)
            else:
                _take_place(unfinished, target)
    except CheckpointError:  # of what is read; it may be an OSError, too
        raise
    except OSError as error:
        # An engine that runs within has failures of its own.
        if error.filename is not None and not str(error.filename).startswith((str(target), str(home / prefix))):
            raise
        raise _cannot_write(error, destination) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _content(target: Path) -> list[str]:
    """What lies in a directory, less what belongs to its volume, or to conversions that go on or were killed."""
    names = sorted(name for name in os.listdir(target) if not name.startswith(_WITHIN))
    return [name for name in names if name not in _OF_VOLUMES] if _is_mount(target) else names


def _no_checkpoint(directory: Path, names: list[str]) -> str | None:
    """Why a directory is none that a conversion or a training wrote; None if it is one."""
    for name in names:
        if (directory / name).is_dir() and not (directory / name).is_symlink():
            return f"it holds the directory {name!r}, which no conversion writes"
    source = PosixSource()
    try:
        found = find_checkpoint(source, str(directory))
        if not isinstance(found, ShardedState):
            open_store(source, found, LoaderSettings()).close()
    except NoCheckpointError:
        return "it is not a checkpoint"
    except CheckpointError as error:
        return f"it is not a checkpoint that can be read: {error.message}"
    return None


def _is_mount(target: Path) -> bool:
    mount = mount_of(target)  # of bind mounts only the kernel's list tells
    return os.path.ismount(target) or (mount is not None and mount.point == str(target))


def _is_fixed(target: Path) -> bool:
    """Whether an existing directory cannot be replaced by another under its name."""
    return _is_mount(target) or not os.access(target.parent, os.W_OK | os.X_OK)


def _new_directory(home: Path, prefix: str) -> Path:
    # tempfile.mkdtemp would make it for this user alone, whatever the umask and the parent's default ACL.
    path = home / f"{prefix}{uuid.uuid4().hex[:12]}"
    path.mkdir()
    return path


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold a lock that says that a conversion goes on."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _clear_left_over(home: Path, prefix: str) -> None:
    """Delete what conversions to this destination left that were killed: nobody holds it, and nothing is written."""
    for path in _beginning(home, prefix):
        with suppress(OSError):
            latest = max(entry.lstat().st_mtime for entry in (path, *path.iterdir()))
            if path.stat().st_uid != os.geteuid() or time.time() - latest < _LEFT_OVER_S:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _beginning(home: Path, prefix: str) -> list[Path]:
    return [home / name for name in os.listdir(home) if name.startswith(prefix)]


def _take_place(unfinished: Path, target: Path) -> None:
    if not target.exists():
        unfinished.rename(target)
    else:
        shutil.copymode(target, unfinished)
        if not exchange(unfinished, target):
            _replace_in_steps(unfinished, target)
            unfinished = target.parent / f".{target.name}-{_REPLACED}{unfinished.name.rpartition('-')[2]}"
    sync_directory(target.parent)
    shutil.rmtree(unfinished, ignore_errors=True)


def _replace_in_steps(unfinished: Path, target: Path) -> None:
    """Where names cannot be exchanged; between the two steps there is no destination, which ``_put_back`` repairs."""
    before = target.parent / f".{target.name}-{_REPLACED}{unfinished.name.rpartition('-')[2]}"
    target.rename(before)
    try:
        unfinished.rename(target)
    except BaseException:
        before.rename(target)
        raise


def _put_back(target: Path) -> None:
    """Give a destination its name again that lost it when a conversion was killed between two renames."""
    if os.path.lexists(target) or not os.path.isdir(target.parent):
        return
    with suppress(OSError):
        replaced = sorted(
            _beginning(target.parent, f".{target.name}-{_REPLACED}"), key=lambda path: path.stat().st_mtime
        )
        if replaced:
            replaced[-1].rename(target)


def _move_in(unfinished: Path, target: Path) -> None:
    """Move what was written into the root of the volume; what makes it a checkpoint for a reader comes last."""
    names = sorted(os.listdir(unfinished), key=lambda name: (name in _LAST, not name.endswith(".safetensors"), name))
    moved = []
    try:
        for name in names:
            (unfinished / name).rename(target / name)
            moved.append(name)
    except BaseException:
        for name in reversed(moved):
            with suppress(OSError):
                (target / name).rename(unfinished / name)
        raise
    sync_directory(target)


def _cannot_write(error: OSError, destination: str) -> CheckpointError:
    return CheckpointError(
        f"it could not be written: {error.strerror or error}", file=destination, hint="nothing of it is left there"
    )
