"""How a stock goes from the process that filled it to a loader: its descriptor and what is in it, over a socket.

Both ends are processes of one user; each asks the kernel for the other's. The memory is sealed: whoever gets it cannot
write to it, and finds it at the size that it was told.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ..errors import CheckpointError
from ..settings import LoaderSettings
from ..sources.registry import is_remote
from ..sources.stock import Stock, StockedPart
from ..start.page_warmer import user_of
from ..start.warming import tell_loader_begins

_SEAL_FUTURE_WRITE = 0x10  # of <linux/fcntl.h>, since Linux 5.1; Python has no name for it before 3.13
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
"""What nobody can do to the memory any more, but for the process that has mapped it already to fill it."""
_LENGTH = struct.Struct("<Q")
_MOST_BYTES = 64 << 20  # of the index; one of a thousand files has some hundred KiB
_WAIT_S = 5.0


def server_of(path: str, settings: LoaderSettings) -> str:
    """The server that is configured for a URL; "" for the one that everybody means, and for what is no URL."""
    if not is_remote(path):
        return ""
    from ..sources.object_store.client import ObjectStoreOptions
    from ..sources.object_store.endpoints import endpoint_of
    from ..sources.object_store.url import parse_object_url

    with suppress(CheckpointError):  # whoever reads from there says so
        return endpoint_of(parse_object_url(path), ObjectStoreOptions.from_settings(settings)) or ""
    return ""


def taken_over(path: str, settings: LoaderSettings) -> Stock | None:
    """Have whoever reads the directory of ``path`` ahead end, since a loader reads from there now, and take its stock.

    Args:
        path: of a file, or its URL.
        settings: by which it is read.

    Returns:
        None: nobody reads ahead there, or what is read lies in the page cache.
    """
    connection = tell_loader_begins(path, server_of(path, settings))
    if connection is None:
        return None
    stock = None
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # then the loader reads all by itself
        connection.settimeout(_WAIT_S)
        if user_of(connection) == os.geteuid():
            stock = _received(connection)
    if stock is None:
        connection.close()
    return stock


def hand_over(connection: socket.socket, descriptor: int, parts: Mapping[str, Sequence[StockedPart]]) -> None:
    """Send a stock to a loader.

    Args:
        connection: to the loader.
        descriptor: of the memory, sealed (``SEALS``).
        parts: identity of a file -> what of it is there.

    Raises:
        OSError: the loader does not take it.
    """
    index = {identity: [(part.begin, part.end, part.position) for part in found] for identity, found in parts.items()}
    content = json.dumps(index).encode()
    connection.settimeout(_WAIT_S)
    socket.send_fds(connection, [_LENGTH.pack(len(content))], [descriptor])
    connection.sendall(content)


def _received(connection: socket.socket) -> Stock | None:
    """The stock that is sent; None: nothing is, or not as ``hand_over`` does.

    Raises:
        OSError: it did not come in time.
        ValueError, TypeError, KeyError, AttributeError: it is something else.
    """
    first, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    try:
        if len(first) != _LENGTH.size or len(descriptors) != 1:
            return None
        (length,) = _LENGTH.unpack(first)
        if length > _MOST_BYTES:
            return None
        content = bytearray()
        while len(content) < length:
            piece = connection.recv(min(length - len(content), 1 << 20))
            if not piece:
                return None
            content += piece
        size = os.fstat(descriptors[0]).st_size
        if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & SEALS != SEALS:
            return None
        parts = {
            identity: [_checked(StockedPart(*part), size) for part in found]
            for identity, found in json.loads(content).items()
        }
        connection.settimeout(None)
        return Stock(descriptors.pop(), parts, connection)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _checked(part: StockedPart, size: int) -> StockedPart:
    """A part that lies in the memory.

    Raises:
        ValueError: it does not.
    """
    if not 0 <= part.begin <= part.end or not 0 <= part.position <= size - (part.end - part.begin):
        raise ValueError("a part is not in the memory")
    return part
