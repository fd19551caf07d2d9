"""Objects of S3, Google Cloud Storage and Azure Blob Storage, read by obstore in ranges.

Opening an object asks for its size and ETag. Every range is requested on the condition that the object is still the one
that was opened, so all bytes that are read are of one version.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import numpy as np

from ...errors import CheckpointError
from ..kept.kept_version import KeptVersion
from ..kept.node_cache import NodeCache
from ..source import UsrbioAccess
from . import ranges
from .client import ObjectStoreOptions, ObjectStores, check_process, condition_of
from .endpoints import endpoint_of
from .ranges import Connections, DirectRanges, Wanted
from .redirects import request_failure
from .request_failures import Answer, is_failure, object_changed, retryable_errno
from .url import ObjectUrl, parse_object_url

if TYPE_CHECKING:
    from obstore import Bytes, GetOptions, ObjectMeta
    from obstore.store import ObjectStore

    from ...settings import LoaderSettings

_T = TypeVar("_T")
_WITH_CACHE = "object_store, kept on this node"


class ObjectFile:
    """An open object; made by ObjectStoreSource."""

    source = "object_store"
    remote = True
    mappable = False
    native_access: UsrbioAccess | None = None

    def __init__(
        self,
        path: str,
        url: ObjectUrl,
        stores: ObjectStores,
        meta: ObjectMeta,
        connections: Connections,
        kept: KeptVersion | None = None,
    ) -> None:
        self.path = path
        self.size = meta["size"]
        self._store: ObjectStore | None = stores.client(url)
        self._key = url.key
        self._range_bytes = stores.options.range_bytes
        self._connections = connections
        self._direct: DirectRanges | None = DirectRanges(url, self._store, stores, connections)
        connections.used()
        self._identity = _identity(meta)
        # None: the identity of each answer is compared instead.
        self._if_match = condition_of(meta["e_tag"])
        self._kept = kept

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        wanted = min(sum(map(len, buffers)), self._range_bytes, self.size - offset)
        if wanted <= 0:
            return 0
        if self._kept is None:
            return self._ask(offset, buffers, wanted)
        done, wanted = self._kept.read(offset, buffers, wanted)
        if done:
            return done
        done = self._ask(offset, buffers, wanted)
        self._kept.keep(offset, buffers, done)
        return done

    def fileno(self) -> int | None:
        return None

    def identity(self) -> str | None:
        return f"{self.path} {self._identity}"

    def verify_unchanged(self) -> None:
        # Every range was already checked to be of the version that was opened.
        return

    def close(self) -> None:
        if self._store is not None:
            self._store = self._direct = None
            self._connections.unused()
            if self._kept is not None:
                self._kept.close()

    def _ask(self, offset: int, buffers: Sequence[memoryview], wanted: int) -> int:
        """Read from the store."""
        if wanted >= ranges.MIN_BYTES and self._receive(offset, offset + wanted, buffers):
            return wanted
        content = self._get(offset, offset + wanted)
        return _scatter(content, buffers, wanted)

    def _receive(self, begin: int, end: int, buffers: Sequence[memoryview]) -> bool:
        direct = self._direct
        if direct is None:
            return False
        check_process(self.path)
        return direct.receive(Wanted(begin, end, self.size, self._if_match, self._is_same), buffers)

    def _is_same(self, tag: str | None, modified: str | None) -> bool:
        """Whether an answer with this ETag and this Last-Modified is of the object that was opened."""
        try:
            answered = {"size": self.size, "e_tag": tag, "last_modified": parsedate_to_datetime(modified or "")}
        except ValueError:
            return False
        return _identity(cast("ObjectMeta", answered)) == self._identity

    def _get(self, begin: int, end: int) -> Bytes:
        """The bytes from ``begin`` to ``end``.

        Raises:
            OSError: the body broke off or stalled.
            TransferError: the request failed for good, or the object was replaced.
        """
        import obstore

        store = self._store
        if store is None:
            raise CheckpointError("the object was closed while it was being read", file=self.path)
        check_process(self.path)
        options: GetOptions = {"range": (begin, end)}
        if self._if_match is not None:
            options["if_match"] = self._if_match
        try:
            result = obstore.get(store, self._key, options=options)
            if _identity(result.meta) != self._identity:
                raise object_changed(self.path, begin)
            content = result.bytes()
        except CheckpointError:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            code = retryable_errno(error)
            if code is not None:
                raise OSError(code, os.strerror(code), self.path) from error
            raise request_failure(store, self._key, error, "read", self.path, begin) from error
        # obstore has compared the range that the server names with the one that was asked for, not what came.
        if len(content) != end - begin:
            raise OSError(errno.EREMOTEIO, os.strerror(errno.EREMOTEIO), self.path)
        return content


@dataclass(frozen=True)
class _Listing:
    """What lies right below a prefix: names of objects, and of further prefixes."""

    tags: dict[str, str]
    folders: Sequence[str]

    @property
    def names(self) -> list[str]:
        return list(self.tags)

    @property
    def is_there(self) -> bool:
        return bool(self.names or self.folders)


class ObjectStoreSource:
    """The object stores that s3://, gs:// and az:// URLs name.

    A prefix is a directory when there is an object below it. A source lists each prefix once, so that a checkpoint is
    opened from one listing.

    Args:
        options: how the stores are reached and read.
        stores: existing clients, instead of clients made from ``options``.
        cache: where ranges are kept on this node; None: nowhere.

    Raises:
        CheckpointError: from each method: obstore is not installed, the path is no URL of an object store, access is
            denied, or the server cannot be reached; the message says what to do.
    """

    name = "object_store"

    def __init__(
        self,
        options: ObjectStoreOptions | None = None,
        *,
        stores: ObjectStores | None = None,
        cache: NodeCache | None = None,
    ) -> None:
        self._cache = cache
        self._stores = stores or ObjectStores(options or ObjectStoreOptions())
        self.options = self._stores.options
        self._listings: dict[ObjectUrl, _Listing] = {}
        self._connections = Connections(self.options.timeout_s)
        self._lock = threading.Lock()

    @classmethod
    def from_settings(cls, settings: LoaderSettings) -> Self:
        """A source that reaches and reads the stores as the settings say."""
        return cls(ObjectStoreOptions.from_settings(settings), cache=NodeCache.from_settings(settings))

    def open(self, path: str) -> ObjectFile:
        url = parse_object_url(path)
        if not url.key:
            raise CheckpointError("this is a bucket where an object is meant", file=path)
        store = self._stores.client(url)
        import obstore

        check_process(path)
        try:
            meta = obstore.head(store, url.key)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise request_failure(
                store, url.key, _with_its_code(store, url.key, error), "open the object", path
            ) from error
        return ObjectFile(path, url, self._stores, meta, self._connections, self._kept(url, meta))

    def _kept(self, url: ObjectUrl, meta: ObjectMeta) -> KeptVersion | None:
        if self._cache is None:
            return None
        place = f"{endpoint_of(url, self.options) or ''} {url.scheme}://{url.bucket}/{url.key}"
        kept = self._cache.version(place, condition_of(meta["e_tag"]), meta["size"])
        if kept is not None and 2 * kept.kept_bytes >= meta["size"]:
            self.name = _WITH_CACHE
        return kept

    def is_dir(self, path: str) -> bool:
        # Credentials that may read an object may not always list its bucket.
        if path.endswith(".safetensors"):
            return False
        return self._listing(path).is_there

    def names(self, path: str) -> list[str]:
        """Names of the objects right below a prefix, sorted; empty where there is nothing below it.

        Raises:
            TransferError: the prefix cannot be listed.
        """
        return self._listing(path).names

    def tags(self, path: str) -> dict[str, str]:
        """Name of each object right below a prefix -> what changes when the object is replaced; sorted by name.

        Raises:
            TransferError: the prefix cannot be listed.
        """
        return dict(self._listing(path).tags)

    def list(self, path: str) -> list[str]:
        listing = self._listing(path)
        if not listing.is_there:
            raise CheckpointError("there is no object below this prefix", file=path, hint="check the URL")
        return listing.names

    def folders(self, path: str) -> Sequence[str]:
        return self._listing(path).folders

    def _listing(self, path: str) -> _Listing:
        url = parse_object_url(path)
        with self._lock:
            known = self._listings.get(url)
        if known is not None:
            return known
        store = self._stores.client(url)
        import obstore

        check_process(path)
        try:
            found = interruptible(lambda: obstore.list_with_delimiter(store, url.key or None))
        except BaseException as error:
            if not is_failure(error):
                raise
            raise request_failure(store, url.key, error, "list the prefix", path) from error
        below = len(url.key) + 1 if url.key else 0
        tags = {meta["path"][below:]: " ".join(map(str, _identity(meta))) for meta in found["objects"]}
        folders = sorted(prefix.rstrip("/")[below:] for prefix in found["common_prefixes"])
        listing = _Listing(dict(sorted(tags.items())), folders)
        with self._lock:
            return self._listings.setdefault(url, listing)


def interruptible(call: Callable[[], _T]) -> _T:
    """Make a call on another thread, so that Ctrl-C ends the wait: obstore itself does not check for signals."""
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="engine-loader-list", daemon=True).start()
    return outcome.result()


def _identity(meta: ObjectMeta) -> tuple[Any, ...]:
    """What changes when an object is replaced: size and ETag; without an ETag, size and time of change (in seconds)."""
    tag = meta["e_tag"]
    return (meta["size"], re.sub("^W/", "", tag) if tag else meta["last_modified"])


def _with_its_code(store: ObjectStore, key: str, error: BaseException) -> BaseException:
    """The failure of a GET of one byte instead of that of a HEAD, whose answer has no body and so no error code."""
    import obstore

    status = Answer.of(error).status
    if status is None or status >= 500:
        return error

    try:
        obstore.get(store, key, options={"range": (0, 1)}).bytes()
    except Exception as explained:
        if type(explained) is type(error):
            return explained
    return error


def _scatter(content: Bytes, buffers: Sequence[memoryview], nbytes: int) -> int:
    """Copy ``nbytes`` into ``buffers`` in turn. numpy gives up the GIL meanwhile, a memoryview would not."""
    source = np.frombuffer(content, np.uint8)  # type: ignore[call-overload]
    done = 0
    for buffer in buffers:
        piece = source[done : min(done + len(buffer), nbytes)]
        np.copyto(np.frombuffer(buffer, np.uint8, len(piece)), piece)
        done += len(piece)
        if done == nbytes:
            break
    return done
