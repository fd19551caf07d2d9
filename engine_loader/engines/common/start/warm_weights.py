"""Weights on their way into the page cache while an engine imports: which files, and what is said of it.

It begins where the engine's first process makes its configuration, and ends where a loader of any process begins to
read the same directory. What that process has found to check it is not found again. Nothing here raises to the engine.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ....errors import CheckpointError
from ....formats.dcp_parts import METADATA_NAME
from ....loading.find import TrainingCheckpoint, find_checkpoint
from ....loading.shards import listed_files
from ....loading.store import TensorStore
from ....loading.weights import open_weights
from ....report.events import recorder
from ....report.load_report import human_bytes
from ....report.phases import WARMING
from ....settings import LoaderSettings, load_settings
from ....sources.hub_models import model_here
from ....sources.registry import is_remote, make_source
from ....start.page_reading import Ranges
from ....start.warming import WarmingAccount, tell_loader_begins, warm_files
from .phase_wrappers import never_raising

_POSIX = "posix"
_WORTH_A_LINE = 0.01  # of all: the kernel drops a few pages now and then


class NotWarmedError(Exception):
    """Weights that are left alone; the message is the reason."""


@dataclass(frozen=True)
class FilesToWarm:
    """What a start will read through the page cache.

    Attributes:
        paths: the files, in the order in which they are read.
        ranges: path -> (offset, length) of what of it is read; files that are not in it are read whole.
    """

    paths: list[str]
    ranges: Mapping[str, Ranges] = field(default_factory=dict)


@never_raising
def begin_to_warm(
    model: str,
    settings: LoaderSettings,
    log: logging.Logger,
    weights: Sequence[str] | TensorStore | None = None,
) -> None:
    """Begin to read a model's weights into the page cache, where the setting ``start.warm`` and they allow it.

    Args:
        model: the model's directory, or its name on the hub.
        settings: how the weights will be read.
        log: the engine's logger.
        weights: what was found at that place: safetensors files, or the open store of a training checkpoint; None: it
            is not known, and looked for here.
    """
    if load_settings().settings.start.warm == "off":
        return
    try:
        files = files_to_warm(model, settings, weights)
    except NotWarmedError as reason:
        log.debug("start.warm: the weights are left alone: %s", reason)
        return
    threading.Thread(target=_warm, args=(files, log), name="engine-loader-warm", daemon=True).start()


@never_raising
def _warm(files: FilesToWarm, log: logging.Logger) -> None:
    began = time.monotonic()
    account = warm_files(files.paths, files.ranges)
    ended = time.monotonic()
    recorder.past_span(WARMING, began, ended, beside=True, bytes=account.read)
    if account.reason or account.read > _WORTH_A_LINE * account.size:
        log.info("start.warm: %s", described(account, ended - began))


@never_raising
def loader_begins(weights: object) -> None:
    """Tell that the loader begins to read ``weights``: whatever reads them into the page cache ends.

    Args:
        weights: as a loader gets them; anything but paths is passed over.
    """
    if isinstance(weights, TrainingCheckpoint):
        first: object = os.path.join(weights.directory, METADATA_NAME)
    else:
        first = next(iter(weights), None) if isinstance(weights, Sequence) else None
    if isinstance(first, str) and not is_remote(first):
        tell_loader_begins(first)


def files_to_warm(
    model: str, settings: LoaderSettings, weights: Sequence[str] | TensorStore | None = None
) -> FilesToWarm:
    """The files that a start will read through the page cache, in the order in which it reads them.

    Of a sharded_state checkpoint, those of all ranks; of a training checkpoint, what of its files is the model's.

    Args:
        model: the model's directory, or its name on the hub.
        settings: how the weights will be read.
        weights: what was found there already; see ``begin_to_warm``.

    Raises:
        NotWarmedError: they are not read through the page cache, or it is not known which they are.
    """
    for name, value in (("read_mode", "direct"), ("transport", "gds"), ("share", "auto")):
        if getattr(settings, name) == value:
            raise NotWarmedError(f"they are read past the page cache (loader.{name}: {value})")
    place = settings.weights_uri or model
    if is_remote(place):
        raise NotWarmedError("they lie in an object store")
    try:
        files = _files_of(weights) if weights is not None else _files_at(model_here(place), settings)
        _check_source(files.paths[0], settings)
    except CheckpointError as error:  # whoever loads them says so
        raise NotWarmedError(str(error)) from None
    return files


def _files_at(place: str, settings: LoaderSettings) -> FilesToWarm:
    source = make_source(settings.backend, settings=settings)
    found = find_checkpoint(source, place, sharded_pattern=settings.sharded_pattern)
    if not isinstance(found, TrainingCheckpoint):
        return FilesToWarm(list(listed_files(source, found)[0]))
    with open_weights(found, settings) as store:
        return _files_of(store)


def _files_of(weights: Sequence[str] | TensorStore) -> FilesToWarm:
    if isinstance(weights, Sequence):
        return FilesToWarm(list(weights))
    # The metadata is read first, and lies in the directory whatever files it names.
    ranges = weights.ranges()
    return FilesToWarm([weights.listing, *ranges], ranges)


def _check_source(path: str, settings: LoaderSettings) -> None:
    first = make_source(settings.backend, settings=settings).open(path)
    kind = first.source
    first.close()
    if kind != _POSIX:
        raise NotWarmedError(f"they are read past the page cache ({kind})")


def described(account: WarmingAccount, seconds: float) -> str:
    """What became of it, in words."""
    if not account.size:
        return f"nothing is read into the page cache: {account.reason or 'no file could be opened'}"
    text = f"{human_bytes(account.read)} into the page cache in {seconds:.1f} s"
    if account.resident:
        text += f", {human_bytes(account.resident)} were there already"
    left = account.size - account.read - account.resident
    return f"{text}; {human_bytes(left)} were left: {account.reason}" if account.reason else text
