"""S3, Google Cloud Storage and Azure as a file system of torch.distributed.checkpoint."""

from __future__ import annotations

import io
import logging
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.filesystem import FileSystemBase

from ..errors import CheckpointError
from ..sources.byte_stream import open_stream
from ..sources.object_store.client import ObjectStores, check_process, require_obstore
from ..sources.object_store.object_source import ObjectStoreSource
from ..sources.object_store.redirects import request_failure
from ..sources.object_store.request_failures import is_request_failure
from ..sources.object_store.url import ObjectUrl, parse_object_url
from .s3_config import AnyClientConfig, S3Setup
from .s3_given_client import GivenClient, S3Client
from .s3_upload import MAX_PARTS, ObjectUpload

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

_DELETE_TRIES = 3
_LONGEST_PAUSE_S = 5.0
# The estimate of an object's size may be a tenth too small.
_MOST_PLANNED_PARTS = MAX_PARTS * 9 // 10


class S3FileSystem(FileSystemBase):
    """Objects below URLs: ``s3://bucket/key``, and ``gs://`` and ``az://`` (whose region is not used).

    Args:
        region: of the buckets; "": the region of the environment.
        s3_client: an obstore ``ObjectStore`` for every path, or s3torchconnector's ``S3Client``, which then makes the
            requests (all but those of ``ls`` and ``times``) and whose exceptions are passed on; None: a client is made
            for each bucket.
        s3client_config: options of the clients, this package's or s3torchconnector's; None: the loader's settings.
        reader_constructor: s3torchconnector's way of reading an object; only an ``S3Client`` needs one.
        options: settings of the loader by name, e.g. ``object_store_requests=32``.

    Raises:
        CheckpointError: obstore is not installed; from each method: a path is no such URL, access is denied, or the
            server cannot be reached or fails.
        SettingsError: an option is unknown or has a bad value.
        TypeError: the config is of another kind.
    """

    def __init__(
        self,
        region: str,
        s3_client: ObjectStore | S3Client | None = None,
        s3client_config: AnyClientConfig | None = None,
        reader_constructor: Any | None = None,
        **options: Any,
    ) -> None:
        require_obstore()
        self._given: GivenClient | None = None
        if isinstance(s3_client, S3Client):
            self._given = GivenClient(s3_client, reader_constructor)
            region = getattr(s3_client, "region", region)
            s3client_config = getattr(s3_client, "s3client_config", s3client_config)
            s3_client = None
        else:
            pass_over(reader_constructor)
        self.setup = S3Setup.of(region, s3client_config, options)
        self.stores = ObjectStores(self.setup.client, client=s3_client)
        self.parts_at_once = int(self.setup.settings.object_store_requests)

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str, *, expected_bytes: int = 0
    ) -> Iterator[io.BufferedIOBase]:
        """A stream to read ("rb") or to write ("wb") an object.

        A written object is published when the block ends, and not if an exception ends the block.

        Args:
            path: URL of the object.
            mode: "rb" or "wb".
            expected_bytes: an estimate of the size of a written object, from which the size of the parts follows.

        Raises:
            ValueError: ``mode`` is neither of these.
        """
        if mode not in ("rb", "wb"):
            raise ValueError(f"mode is {mode!r}; objects are opened by 'rb' (to read) or 'wb' (to write)")
        text = os.fspath(path)
        if self._given is not None:
            url = self._url(text)
            with self._given.reading(url) if mode == "rb" else self._given.writing(url) as stream:
                yield stream
            return
        if mode == "rb":
            with open_stream(self.source(), text, self.setup.part_bytes) as stream:
                yield stream
            return
        url, store = self._object(text)
        part_bytes = max(self.setup.part_bytes, math.ceil(expected_bytes / _MOST_PLANNED_PARTS))
        with ObjectUpload(store, url.key, text, part_bytes=part_bytes, parts_at_once=self.parts_at_once) as upload:
            yield upload

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """The URL of ``suffix`` below ``path``."""
        return f"{os.fspath(path).rstrip('/')}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """The URL of a checkpoint, without slashes at its end.

        Raises:
            CheckpointError: ``path`` is not a URL of an object store.
        """
        text = os.fspath(path)
        parse_object_url(text)
        return text.rstrip("/")

    def rename(self, old_path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Copy an object within its bucket, on the server, and delete the old object, with up to three tries.

        Raises:
            ValueError: the buckets differ.
        """
        import obstore

        url, new_url = self._url(old_path), self._url(new_path)
        if (url.scheme, url.bucket) != (new_url.scheme, new_url.bucket):
            raise ValueError(f"{os.fspath(old_path)} cannot be renamed to {os.fspath(new_path)}: the buckets differ")
        if self._given is not None:
            self._given.copy(url, new_url)
        else:
            _, store = self._object(old_path)
            with _clear_errors(store, url.key, "copy the object", old_path):
                obstore.copy(store, url.key, new_url.key)
        for tried in range(1, _DELETE_TRIES + 1):
            try:
                self.rm_file(old_path)
                return
            except Exception as error:
                if tried == _DELETE_TRIES:
                    raise
                logger.warning("trying again: %s", error)
                time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, 2.0**tried)))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing: object stores have no directories."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True if this is a URL of an object store."""
        try:
            parse_object_url(os.fspath(checkpoint_id))
        except CheckpointError:
            return False
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """True if there is an object (by HEAD).

        Raises:
            CheckpointError: the server refuses the request, or fails.
        """
        import obstore

        if self._given is not None:
            return self._given.exists(self._url(path))
        url, store = self._object(path)
        with _clear_errors(store, url.key, "look for the object", path):
            try:
                obstore.head(store, url.key)
            except FileNotFoundError:
                return False
        return True

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Delete an object. S3 reports no error if there is no object.

        Raises:
            CheckpointError: the object cannot be deleted.
        """
        import obstore

        if self._given is not None:
            self._given.delete(self._url(path))
            return
        url, store = self._object(path)
        with _clear_errors(store, url.key, "delete the object", path):
            obstore.delete(store, url.key)

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """URLs of the objects directly below a prefix, sorted; empty if there is none."""
        text = os.fspath(path)
        return [self.concat_path(text, name) for name in self.source().names(text)]

    def times(self, path: str | os.PathLike[str]) -> dict[str, float]:
        """The objects directly below a prefix by name, each with the time of its upload in seconds since 1970.

        Raises:
            CheckpointError: the prefix cannot be listed.
        """
        import obstore

        url = parse_object_url(os.fspath(path))
        check_process(os.fspath(path))
        store = self.stores.client(url)
        with _clear_errors(store, url.key, "list the prefix", path):
            found = obstore.list_with_delimiter(store, url.key or None)
        return {meta["path"].rpartition("/")[2]: meta["last_modified"].timestamp() for meta in found["objects"]}

    def times_below(self, path: str | os.PathLike[str]) -> dict[str, float]:
        """All objects below a prefix, at any depth, by their names relative to it, as in ``times``.

        Raises:
            CheckpointError: the prefix cannot be listed.
        """
        import obstore

        url = parse_object_url(os.fspath(path))
        check_process(os.fspath(path))
        store = self.stores.client(url)
        begin = f"{url.key}/" if url.key else ""
        with _clear_errors(store, url.key, "list the prefix", path):
            return {
                meta["path"].removeprefix(begin): meta["last_modified"].timestamp()
                for batch in obstore.list(store, url.key or None)
                for meta in batch
            }

    def source(self) -> ObjectStoreSource:
        """A source for reading objects; it lists each prefix once and keeps the listing."""
        return ObjectStoreSource(stores=self.stores)

    def _url(self, path: str | os.PathLike[str]) -> ObjectUrl:
        text = os.fspath(path)
        url = parse_object_url(text)
        if not url.key:
            raise CheckpointError("this is a bucket where an object is meant", file=text)
        return url

    def _object(self, path: str | os.PathLike[str]) -> tuple[ObjectUrl, ObjectStore]:
        url = self._url(path)
        check_process(os.fspath(path))
        return url, self.stores.client(url)


def pass_over(reader_constructor: Any | None) -> None:
    """Say, for who debugs, that s3torchconnector's way of reading is not needed."""
    if reader_constructor is not None:
        kind = getattr(reader_constructor, "func", None) or type(reader_constructor)
        logger.debug("reader_constructor (%s) is passed over: reads are planned here", kind.__name__)


@contextmanager
def _clear_errors(store: ObjectStore, key: str, doing: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn exceptions of the client into errors that say what to do."""
    try:
        yield
    except BaseException as error:
        if not is_request_failure(error):
            raise
        raise request_failure(store, key, error, doing, os.fspath(path)) from error
