"""The directory that a conversion writes: complete under its name, or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from ..formats.dcp_metadata import METADATA_NAME
from ..machine import sync_directory
from ..report.load_report import human_bytes
from ..sources.registry import is_remote


def check_destination(source: str, destination: str, *, overwrite: bool) -> None:
    """Refuse what cannot or should not be written to.

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
    if not target.exists():
        return
    names = sorted(os.listdir(target)) if target.is_dir() else None
    if names is None:
        raise CheckpointError("this is a file, not a directory", file=destination)
    if names and not overwrite:
        raise CheckpointError(
            "the destination holds something",
            file=destination,
            hint="name a new directory, or overwrite it: --overwrite",
        )
    if names and not any(name in (METADATA_NAME, "config.json") or name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            "this is not overwritten, because it is no checkpoint", file=destination, hint="name a new directory"
        )


@contextmanager
def unfinished_directory(destination: str, nbytes: int) -> Iterator[Path]:
    """A directory beside the destination, which takes its name at the end; on any error it is deleted.

    What the destination held is deleted when the new one has its name.

    Args:
        destination: its path.
        nbytes: what will be written, at least.

    Raises:
        CheckpointError: there is no room for it, or something cannot be written.
    """
    target = Path(destination).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise CheckpointError(
                f"it takes {human_bytes(nbytes)}, and {human_bytes(free)} are free there", file=destination
            )
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-unfinished-", dir=target.parent))
    except OSError as error:
        raise _cannot_write(error, destination) from error
    try:
        yield unfinished
        unfinished.chmod(0o755)
        sync_directory(unfinished)
        _take_place(unfinished, target)
    except OSError as error:
        raise _cannot_write(error, destination) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _take_place(unfinished: Path, target: Path) -> None:
    before: Path | None = None
    if target.exists():
        before = Path(tempfile.mkdtemp(prefix=f".{target.name}-replaced-", dir=target.parent))
        target.rename(before)  # takes the place of the empty directory
    try:
        unfinished.rename(target)
    except BaseException:
        if before is not None:
            before.rename(target)
        raise
    sync_directory(target.parent)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def _cannot_write(error: OSError, destination: str) -> CheckpointError:
    return CheckpointError(
        f"it could not be written: {error.strerror or error}", file=destination, hint="nothing of it is left there"
    )
