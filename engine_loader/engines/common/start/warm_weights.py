"""Weights on their way into memory while an engine imports: which files, and what is said of it.

They go into the page cache, or, where they are read past it (3FS, O_DIRECT, object stores), into memory that the loader
takes over (see ahead/). It begins where the engine's first process makes its configuration, and ends where a loader of
any process begins to read the same directory. What that process has found to check it is not found again. Nothing here
raises to the engine.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ....ahead.handing_over import taken_over
from ....ahead.stocking import stock_files
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
from ....sources.stock import Stock
from ....start.page_reading import Ranges
from ....start.warming import WarmingAccount, warm_files
from .phase_wrappers import never_raising

_WORTH_A_LINE = 0.01  # of all: the kernel drops a few pages now and then


class NotWarmedError(Exception):
    """Weights that are left alone; the message is the reason."""


@dataclass(frozen=True)
class FilesToWarm:
    """What a start will read.

    Attributes:
        paths: the files, in the order in which they are read.
        ranges: path -> (offset, length) of what of it is read; files that are not in it are read whole.
        past_page_cache: whether they are read past the page cache.
    """

    paths: list[str]
    ranges: Mapping[str, Ranges] = field(default_factory=dict)
    past_page_cache: bool = False


@never_raising
def begin_to_warm(
    model: str,
    settings: LoaderSettings,
    log: logging.Logger,
    weights: Sequence[str] | TensorStore | None = None,
) -> None:
    """Begin to read a model's weights into memory, where the setting ``start.warm`` and they allow it.

    Args:
        model: the model's directory, or its name on the hub.
        settings: how the weights will be read.
        log: the engine's logger.
        weights: what was found at that place: safetensors files, or the open store of a training checkpoint; None: it
            is not known, and looked for here.
    """
    start = load_settings().settings.start
    if start.warm == "off":
        return
    try:
        files = files_to_warm(model, settings, weights)
    except NotWarmedError as reason:
        log.debug("start.warm: the weights are left alone: %s", reason)
        return
    if files.past_page_cache:
        work = partial(_stock, files, settings, int(start.warm_bytes), log)
    else:
        work = partial(_warm, files, log)
    threading.Thread(target=work, name="engine-loader-warm", daemon=True).start()


@never_raising
def _warm(files: FilesToWarm, log: logging.Logger) -> None:
    began = time.monotonic()
    account = warm_files(files.paths, files.ranges)
    ended = time.monotonic()
    recorder.past_span(WARMING, began, ended, beside=True, bytes=account.read)
    if account.reason or account.read > _WORTH_A_LINE * account.size:
        log.info("start.warm: %s", described(account, ended - began))


@never_raising
def _stock(files: FilesToWarm, settings: LoaderSettings, most_bytes: int, log: logging.Logger) -> None:
    began = time.monotonic()

    def tell(account: WarmingAccount) -> None:
        ended = time.monotonic()
        recorder.past_span(WARMING, began, ended, beside=True, bytes=account.read)
        log.info("start.warm: %s", stock_described(account, ended - began))

    stock_files(files.paths, files.ranges, settings, most_bytes, tell)


@never_raising
def loader_begins(weights: object, settings: LoaderSettings) -> Stock | None:
    """Tell that the loader begins to read ``weights``: whatever reads them ahead ends.

    Args:
        weights: as a loader gets them; anything but paths is passed over.
        settings: how they are read.

    Returns:
        What of them was read into memory, for the loader to take over; None: nothing was.
    """
    if isinstance(weights, TrainingCheckpoint):
        first: object = os.path.join(weights.directory, METADATA_NAME)
    else:
        first = next(iter(weights), None) if isinstance(weights, Sequence) else None
    return taken_over(first, settings) if isinstance(first, str) else None


def files_to_warm(
    model: str, settings: LoaderSettings, weights: Sequence[str] | TensorStore | None = None
) -> FilesToWarm:
    """The files that a start will read, in the order in which it reads them.

    Of a sharded_state checkpoint, those of all ranks; of a training checkpoint, what of its files is the model's.

    Args:
        model: the model's directory, or its name on the hub.
        settings: how the weights will be read.
        weights: what was found there already; see ``begin_to_warm``.

    Raises:
        NotWarmedError: they do not pass through this machine's memory, or it is not known which they are.
    """
    if settings.transport == "gds":
        raise NotWarmedError("they are read past this machine's memory (loader.transport: gds)")
    place = settings.weights_uri or model
    try:
        if weights is None:
            weights_here = place if is_remote(place) else model_here(place)
            files = _files_at(weights_here, settings)
        else:
            files = _files_of(weights)
        return replace(files, past_page_cache=_past_page_cache(files.paths[0], settings))
    except CheckpointError as error:  # whoever loads them says so
        raise NotWarmedError(str(error)) from None


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


def _past_page_cache(path: str, settings: LoaderSettings) -> bool:
    first = make_source(settings.backend, settings=settings).open(path)
    try:
        return not first.mappable or settings.read_mode == "direct" or settings.share == "auto"
    finally:
        first.close()


def described(account: WarmingAccount, seconds: float) -> str:
    """What became of it, in words."""
    if not account.size:
        return f"nothing is read into the page cache: {account.reason or 'no file could be opened'}"
    text = f"{human_bytes(account.read)} into the page cache in {seconds:.1f} s"
    if account.resident:
        text += f", {human_bytes(account.resident)} were there already"
    left = account.size - account.read - account.resident
    return f"{text}; {human_bytes(left)} were left: {account.reason}" if account.reason else text


def stock_described(account: WarmingAccount, seconds: float) -> str:
    """What became of weights that are read past the page cache, in words."""
    if not account.read:
        return f"nothing is read ahead: {account.reason or 'no file could be opened'}"
    text = f"{human_bytes(account.read)} into memory in {seconds:.1f} s, until the loader takes them over"
    return f"{text}; {account.reason}" if account.reason else text
