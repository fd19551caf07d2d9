"""Picks the kind of reader threads: native or Python."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache
from typing import TYPE_CHECKING

from ..errors import TransferError
from ..sources.source import SourceFile
from .cpus import ranks_of_node
from .native.library import load_library
from .native.native_readers import NativeReaders
from .protocol import ReaderThreads

if TYPE_CHECKING:
    from ..settings import LoaderSettings

logger = logging.getLogger(__name__)

DEFAULT_IO_BYTES = 4 << 20
# Asking once more takes about as long as reading this much on.
REMOTE_GAP_BYTES = 1 << 20


def make_readers_for(files: Collection[SourceFile], settings: LoaderSettings) -> ReaderThreads:
    """The reader threads that read these open files; see ``make_readers``."""
    return make_readers(
        settings,
        descriptors=all(file.fileno() is not None for file in files),
        remote=any(file.remote for file in files),
        nbytes=sum(file.size for file in files),
    )


def make_readers(
    settings: LoaderSettings, *, descriptors: bool = True, remote: bool = False, nbytes: int | None = None
) -> ReaderThreads:
    """The reader threads that ``settings.engine`` asks for.

    Args:
        settings: the loader's settings.
        descriptors: whether all files have descriptors, which native threads need.
        remote: whether there are objects of an object store among the files: they are read in larger pieces, by more
            threads.
        nbytes: that there are to read; no more memory is page-locked. None: not known.

    Raises:
        TransferError: native reader threads were asked for by name and are not available.
    """
    if settings.engine == "cpp" and not descriptors:
        raise TransferError(
            "native reader threads read files by their descriptors, and these have none", hint="set engine to auto"
        )
    native = settings.engine == "cpp" or (settings.engine == "auto" and descriptors and _native_is_there())
    if native:
        pinned = int(settings.device_pinned_bytes)
        return NativeReaders(
            settings.threads,
            block_bytes=int(settings.io_bytes or DEFAULT_IO_BYTES),
            direct_block_bytes=None if settings.io_bytes is None else int(settings.io_bytes),
            ranks=settings.ranks_per_node or ranks_of_node(),
            max_tries=settings.max_tries,
            deadline_s=settings.deadline_s,
            read_mode=settings.read_mode,
            pinned_bytes=pinned if nbytes is None else min(pinned, max(nbytes, 1)),
            device_runtime=settings.device_runtime,
        )
    from .python.python_readers import DEFAULT_GAP_BYTES, PythonReaders

    return PythonReaders(
        settings.object_store_requests if remote else settings.threads,
        block_bytes=int(settings.object_store_range_bytes if remote else settings.io_bytes or DEFAULT_IO_BYTES),
        max_tries=settings.max_tries,
        deadline_s=settings.deadline_s,
        gap_bytes=REMOTE_GAP_BYTES if remote else DEFAULT_GAP_BYTES,
    )


@cache
def _native_is_there() -> bool:
    try:
        load_library()
    except TransferError as error:
        # Said once; pip hides what the build said.
        logger.warning("reading with the slower pure-Python reader threads: %s", error)
        return False
    return True
