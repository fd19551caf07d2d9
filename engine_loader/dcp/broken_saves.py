"""Finds the data files that saves left in a checkpoint's directory which never came to publish their metadata."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Collection, Mapping
from typing import cast

from torch.distributed.checkpoint.filesystem import FileSystemBase

from ..formats.dcp_metadata import parse_metadata

DATA_FILE = re.compile(r"__(\d+)_(\d+)\.distcp\Z")
"""Of a data file's name without directories: the rank's number, and the file's among those of the rank."""


def left_behind(files: Mapping[str, float], used: Collection[str]) -> set[str]:
    """The data files that no metadata names and that are older than those of the checkpoint that was just published.

    Args:
        files: the files of the checkpoint's directories by their relative paths: the time of each one's last change.
        used: the files that the metadata names.

    A rank numbers its files upwards from what it finds, so a lower number is an older file of the same rank. Of ranks
    that the checkpoint does not have, the times count.
    """
    first: dict[str, int] = {}
    for name in used:
        prefix, number = _split(name)
        if number is not None:
            first[prefix] = min(number, first.get(prefix, number))
    begun = min((files[name] for name in used if name in files), default=None)
    found = set()
    for name, changed in files.items():
        prefix, number = _split(name)
        if number is None or name in used:
            continue
        if number < first[prefix] if prefix in first else begun is not None and changed < begun:
            found.add(name)
    return found


def files_named_by(fs: FileSystemBase, metadata_path: str | os.PathLike[str]) -> set[str]:
    """The data files that metadata names, relative to the checkpoint's directory.

    Raises:
        OSError: the metadata cannot be read.
        CheckpointError: it is wrong.
    """
    with fs.create_stream(metadata_path, "rb") as stream:
        content = cast(io.BufferedIOBase, stream).read()
    metadata = parse_metadata(content, os.fspath(metadata_path))
    return {info.relative_path for info in (metadata.storage_data or {}).values()}


def _split(name: str) -> tuple[str, int | None]:
    """The prefix that a rank's files share, with the directory, and the file's number; None for no data file's name."""
    directory, _, base = name.rpartition("/")
    match = DATA_FILE.match(base)
    return (f"{directory}/__{match[1]}_", int(match[2])) if match else (name, None)
