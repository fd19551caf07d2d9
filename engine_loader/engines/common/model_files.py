"""Models that lie in an object store as a whole: configuration and tokenizer are fetched into a directory of this node.

Engines read these as files. A copy is complete or not there, and is named by the ETags of what it holds: when an object
changes, the next start makes another copy; when the store cannot be reached, a start takes the last one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ...compile_cache.ownership import open_to_others
from ...compile_cache.trust.places import make_private, replaceable
from ...errors import CheckpointError, TransferError
from ...home import home_expanded, temporary_directory_name
from ...loading.companions import is_companion
from ...loading.shards import read_small_file
from ...settings import LoaderSettings
from ...sources.object_store.client import ObjectStoreOptions
from ...sources.object_store.object_source import ObjectStoreSource
from ...sources.registry import is_remote

logger = logging.getLogger(__name__)

_KEPT = 3
"""Copies of a model that are kept: engines that run may still read an older one."""
_TRIES_WITH_COPY = 2
_CONFIG = "config.json", "params.json"
_LEFT_OUT = ("original", "metal", "onnx", "openvino", "runs", "logs")
"""Folders of a model with other formats of it, or of its training."""
_UNFINISHED = ".unfinished-"


def local_copy(url: str, settings: LoaderSettings) -> str:
    """A directory with what the model at ``url`` has beside its weights.

    Args:
        url: of the model's prefix in an object store.
        settings: how the store is reached.

    Raises:
        CheckpointError: there is no model, or the store cannot be reached and there is no copy from an earlier start.
    """
    url = url.rstrip("/")
    home = _cache_directory() / hashlib.sha256(url.encode()).hexdigest()[:16]
    options = ObjectStoreOptions.from_settings(settings)
    if _copies(home):  # something to go on with: not to be waited for long
        options = replace(options, max_tries=min(options.max_tries, _TRIES_WITH_COPY))
    source = ObjectStoreSource(options)
    try:
        wanted = dict(_companions(source, url))
        if not any(name in wanted for name in _CONFIG):
            raise CheckpointError(
                f"there is no {' or '.join(_CONFIG)}: this is not a model", file=url, hint="check the URL"
            )
        copy = home / _revision(wanted)
        if not copy.is_dir():
            _fetch(source, url, wanted, copy)
    except TransferError as error:
        last = next(iter(_copies(home)), None)
        if last is None:
            raise
        logger.warning("%s: %s; configuration and tokenizer are those of an earlier start", url, error.message)
        return str(last)
    os.utime(copy)
    for old in _copies(home)[_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return str(copy)


def local_paths(model: str, tokenizer: str | None, settings: LoaderSettings) -> tuple[str, str | None]:
    """Directories in the place of a model's URL and of its tokenizer's; another tokenizer than a URL as it is given.

    Raises:
        CheckpointError: as of ``local_copy``.
    """
    directory = local_copy(model, settings)
    if tokenizer is None or not is_remote(tokenizer):
        return directory, tokenizer
    same = tokenizer.rstrip("/") == model.rstrip("/")
    return directory, directory if same else local_copy(tokenizer, settings)


def _companions(source: ObjectStoreSource, url: str) -> Iterator[tuple[str, str]]:
    """(path below ``url``, ETag and size) of what is no weights, right below and in folders."""
    tags = source.tags(url)
    if not tags and not source.folders(url):
        source.list(url)  # raises: there is nothing
    yield from ((name, tag) for name, tag in tags.items() if is_companion(name))
    for folder in source.folders(url):
        if not folder.startswith(".") and folder not in _LEFT_OUT:
            inside = source.tags(f"{url}/{folder}")
            yield from ((f"{folder}/{name}", tag) for name, tag in inside.items() if is_companion(name))


def _revision(wanted: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(wanted.items())).encode()).hexdigest()[:16]


def _fetch(source: ObjectStoreSource, url: str, wanted: Mapping[str, str], copy: Path) -> None:
    """Make ``copy``; where several processes do, one wins, and all have the same."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=copy.parent))
    try:
        for name in wanted:
            path = unfinished / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(read_small_file(source, f"{url}/{name}"))
        try:
            unfinished.rename(copy)
        except OSError:
            if not copy.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copies(home: Path) -> list[Path]:
    """The complete copies of a model, that of the last start first."""
    try:
        found = [path for path in home.iterdir() if path.is_dir() and not path.name.startswith(_UNFINISHED)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _cache_directory() -> Path:
    """Where copies are; below the temporary directory where the user's cache cannot be written, or others may write.

    Engines run code that a model brings, if they are told to trust it: what others could have put here is not taken.
    """
    places = [Path(temporary_directory_name(), f"engine_loader-{os.getuid()}", "models")]
    with suppress(OSError):  # no home
        places.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or home_expanded("~/.cache"), "engine_loader", "models"))
    for place in places:
        try:
            make_private(place)
            where, reason = replaceable(place) or (place, open_to_others(place.stat()))
        except OSError as error:
            where, reason = place, str(error)
        if reason is None:
            return place
    raise CheckpointError(
        f"the model's configuration and tokenizer cannot be kept in {where}: {reason}",
        hint="set XDG_CACHE_HOME to a directory that only this user can write",
    )
