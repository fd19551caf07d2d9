"""Ranges of objects, received straight into their memory: half of the CPU time of collecting a body first.

Only complete answers for the requested range and version are accepted. After any other answer, obstore reads the rest
of the object: it retries, has every way of authenticating, and request_failures.py explains its failures.
"""

from __future__ import annotations

import errno
import http.client
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import getproxies_environment

from .authorities import tls_context
from .client import ObjectStores
from .endpoints import endpoint_of
from .request_failures import is_failure
from .url import ObjectUrl

if TYPE_CHECKING:
    from obstore.store import ObjectStore, S3Store

MIN_BYTES = 1 << 20
"""Smaller ranges are read by obstore."""
_CONNECT_S = 5.0
_SIGNED_FOR = timedelta(hours=1)
_SIGN_AGAIN_S = 600.0
_REFUSED = (400, 401, 403)
_ERROR_BYTES = 4096


class Connections:
    """Idle connections for further requests; they are closed with the last open object."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._tls: ssl.SSLContext | None = None
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._users = 0
        self._lock = threading.Lock()

    def used(self) -> None:
        """Count an object that was opened."""
        with self._lock:
            self._users += 1

    def unused(self) -> None:
        """Count an object that was closed; the last one closes the idle connections."""
        with self._lock:
            self._users -= 1
            idle = [] if self._users else [one for several in self._idle.values() for one in several]
            if idle:
                self._idle.clear()
        for connection in idle:
            connection.close()

    def take(self, url: SplitResult) -> tuple[http.client.HTTPConnection, bool]:
        """A connection to a URL's host, and whether it was used before."""
        with self._lock:
            idle = self._idle.get((url.scheme, url.netloc))
            if idle:
                return idle.pop(), True
        timeout_s = min(_CONNECT_S, self._timeout_s)
        if url.scheme == "https":
            if self._tls is None:
                self._tls = tls_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                url.netloc, timeout=timeout_s, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(url.netloc, timeout=timeout_s)
        connection.connect()
        connection.sock.settimeout(self._timeout_s)
        return connection, False

    def give(self, url: SplitResult, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last answer was read to its end."""
        with self._lock:
            if self._users:
                self._idle.setdefault((url.scheme, url.netloc), []).append(connection)
                return
        connection.close()


@dataclass(frozen=True)
class Wanted:
    """A range, and what an answer for it must match.

    Attributes:
        begin, end: of the range.
        size: of the object.
        if_match: the ETag that is asked for, if there is one.
        is_same: tells by ETag and Last-Modified whether an answer is of the object that was opened.
    """

    begin: int
    end: int
    size: int
    if_match: str | None
    is_same: Callable[[str | None, str | None], bool]


class DirectRanges:
    """The ranges of one object in S3. May be used from several threads."""

    def __init__(self, url: ObjectUrl, store: ObjectStore, stores: ObjectStores, connections: Connections) -> None:
        self._url, self._store, self._options = url, store, stores.options
        self._connections = connections
        self._endpoint = endpoint_of(url, stores.options)
        # The address of an object that is asked for without a signature is known for one kind of server.
        known = not stores.options.anonymous or (self._endpoint is not None and not stores.options.virtual_host)
        self._usable = url.scheme == "s3" and known and not stores.foreign and not getproxies_environment()
        self._target: SplitResult | None = None
        self._signed_at = 0.0

    def receive(self, wanted: Wanted, buffers: Sequence[memoryview]) -> bool:
        """Fill ``buffers`` in turn with a range; False where that is not possible in this way.

        Raises:
            OSError: the body broke off or stalled.
        """
        if not self._usable:
            return False
        try:
            target = self._signed()
            connection, answer = self._ask(target, wanted)
        # Whatever it was, obstore will say it, or do better.
        except BaseException as error:
            if not is_failure(error):
                raise
            self._usable = False
            return False
        keep = False
        try:
            if not _is_accepted(answer, wanted):
                if answer.status in _REFUSED and b"ExpiredToken" in answer.read(_ERROR_BYTES):
                    # obstore fetches the credentials anew, and the next URL is signed with those.
                    self._target = None
                else:
                    self._usable = False
                return False
            _fill(answer, buffers, wanted.end - wanted.begin)
            answer.read()  # marks the response as complete, so that its connection can be used again
            keep = not answer.will_close
            return True
        finally:
            if keep:
                self._connections.give(target, connection)
            else:
                answer.close()
                connection.close()

    def _ask(self, target: SplitResult, wanted: Wanted) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        headers = {"Range": f"bytes={wanted.begin}-{wanted.end - 1}", "User-Agent": "engine-loader"}
        if wanted.if_match is not None:
            headers["If-Match"] = wanted.if_match
        path = f"{target.path}?{target.query}" if target.query else target.path
        while True:
            connection, was_used = self._connections.take(target)
            try:
                connection.request("GET", path, headers=headers)
                return connection, connection.getresponse()
            except BaseException as error:
                connection.close()
                # The server may have closed it meanwhile.
                if not was_used or not isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                    raise

    def _signed(self) -> SplitResult:
        """The URL to ask, signed where requests are."""
        import obstore

        target = self._target
        if target is None or time.monotonic() - self._signed_at > _SIGN_AGAIN_S:
            if self._options.anonymous:
                target = urlsplit(f"{self._endpoint}/{self._url.bucket}/{quote(self._url.key)}")
            else:
                target = urlsplit(obstore.sign(cast("S3Store", self._store), "GET", self._url.key, _SIGNED_FOR))
            self._target, self._signed_at = target, time.monotonic()
        return target


def _is_accepted(answer: http.client.HTTPResponse, wanted: Wanted) -> bool:
    return (
        answer.status == 206
        and answer.getheader("Content-Range") == f"bytes {wanted.begin}-{wanted.end - 1}/{wanted.size}"
        and answer.length == wanted.end - wanted.begin
        and answer.getheader("Content-Encoding", "identity") == "identity"
        and wanted.is_same(answer.getheader("ETag"), answer.getheader("Last-Modified"))
    )


def _fill(answer: http.client.HTTPResponse, buffers: Sequence[memoryview], nbytes: int) -> None:
    for buffer in buffers:
        view = buffer[:nbytes]
        nbytes -= len(view)
        while view:
            try:
                got = answer.readinto(view)
            except TimeoutError as error:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
            except (OSError, http.client.HTTPException) as error:
                raise OSError(errno.EREMOTEIO, os.strerror(errno.EREMOTEIO)) from error
            if not got:
                raise OSError(errno.EREMOTEIO, os.strerror(errno.EREMOTEIO))
            view = view[got:]
