"""A store in an object store's bucket: s3://bucket/prefix, gs://, az://.

Endpoint, region and credentials are those of the environment (docs/object-storage.md).
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...sources.object_store.client import ObjectStoreOptions, condition_of, make_client
from ...sources.object_store.request_failures import is_request_failure, object_failure
from ...sources.object_store.url import parse_object_url
from ..cache_errors import CacheValidationError
from ..space import no_room_is_an_interruption
from ..trust import Trust
from .interface import SUFFIX, Stored

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

# A larger pack goes up in parts, and those cannot be sent on the condition that the name is free.
_WHOLE_BYTES = 64 << 20


class ObjectCacheStore:
    """Packs as objects below ``url``.

    A pack is written to a temporary file, and put under its content hash when it is complete. No object
    is changed, so a server that ignores the condition of a put (that the name is free) does no harm. Retention counts
    from the upload: a use cannot be noted without writing the pack again.

    Args:
        url: of a prefix.
        trust: what is taken from it.
        work_directory: for the temporary file; None: the temporary directory.

    Raises:
        CacheValidationError: packs are not signed and trust is not "anyone" (who may write to a bucket cannot be
            checked), or obstore is not installed.
    """

    def __init__(self, url: str, trust: Trust, work_directory: str | None = None) -> None:
        if trust.secret is None and not trust.anyone:
            raise CacheValidationError(
                f"{url}: refused: an object store does not say who else may write to it, and caches are code; "
                "sign packs with compile_cache.key_file, or allow it with compile_cache.trust=anyone"
            )
        try:
            location = parse_object_url(url)
            self._store = make_client(location, ObjectStoreOptions())
        except CheckpointError as error:
            raise CacheValidationError(f"compile_cache.directory: {error}") from None
        self.description = url.rstrip("/")
        self._prefix = f"{location.key}/" if location.key else ""
        self._work_directory = work_directory

    def list(self, prefix: str = "") -> Iterable[Stored]:
        import obstore

        found: list[Stored] = []
        with _errors_of(self.description, "list the store"):
            for metas in obstore.list(self._store, f"{self._prefix}{prefix}" or None, chunk_size=1000):
                found += [self._stored(meta) for meta in metas]
        return sorted((stored for stored in found if self._is_pack(stored)), key=lambda stored: stored.name)

    @contextmanager
    def open(self, name: str) -> Iterator[_Object]:
        import obstore

        location = f"{self.description}/{name}"
        with _errors_of(location, "open the pack"):
            meta = obstore.head(self._store, self._prefix + name)
        yield _Object(self._store, location, self._prefix + name, meta)

    @contextmanager
    def upload(self, prefix: str) -> Iterator[_Upload]:
        directory = Path(self._work_directory or tempfile.gettempdir()).expanduser()
        with no_room_is_an_interruption(directory):
            handle, path = tempfile.mkstemp(prefix="engine-loader-pack-", dir=directory)
            upload = _Upload(self, handle, path)
            try:
                yield upload
            finally:
                upload.close()

    def mark_used(self, name: str) -> None:
        return

    def delete(self, name: str) -> None:
        import obstore

        try:
            with _errors_of(f"{self.description}/{name}", "delete the pack"):
                obstore.delete(self._store, self._prefix + name)
        except FileNotFoundError:
            return

    def unfinished(self) -> Iterator[Stored]:
        # Parts of an upload that broke off are not listed; the bucket's lifecycle rules delete them.
        return iter(())

    def make_room(self, coming: int) -> None:
        return

    def put(self, name: str, path: str) -> None:
        """Upload a file. Where the name exists, its content is the same.

        Raises:
            OSError: the server refuses it, or fails.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, GenericError, NotSupportedError

        key = self._prefix + name
        with _errors_of(f"{self.description}/{name}", "write the pack"):
            if os.path.getsize(path) <= _WHOLE_BYTES:
                try:
                    obstore.put(self._store, key, Path(path), mode="create")
                    return
                except AlreadyExistsError:
                    return
                except NotSupportedError:
                    pass
                except GenericError as error:
                    if "501" not in str(error):
                        raise
            obstore.put(self._store, key, Path(path))

    def _stored(self, meta: ObjectMeta) -> Stored:
        return Stored(meta["path"].removeprefix(self._prefix), meta["size"], meta["last_modified"].timestamp())

    def _is_pack(self, stored: Stored) -> bool:
        return stored.name.endswith(SUFFIX) and stored.name.count("/") == 2


class _Object:
    def __init__(self, store: ObjectStore, location: str, key: str, meta: ObjectMeta) -> None:
        self.size = meta["size"]
        self._store, self._location, self._key = store, location, key
        self._if_match = condition_of(meta["e_tag"])

    def read(self, offset: int, size: int) -> bytes:
        import obstore

        if not size:
            return b""
        options: GetOptions = {"range": (offset, offset + size), "if_match": self._if_match}
        with _errors_of(self._location, "read the pack"):
            content = bytes(obstore.get(self._store, self._key, options=options).bytes())
        if len(content) != size:
            raise OSError(f"{self._location} ends before byte {offset + size}")
        return content


class _Upload:
    def __init__(self, store: ObjectCacheStore, handle: int, path: str) -> None:
        self._store = store
        self._file = os.fdopen(handle, "wb")
        self._path = path

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def commit(self, name: str) -> None:
        self._file.flush()
        self._store.put(name, self._path)

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            Path(self._path).unlink(missing_ok=True)


@contextmanager
def _errors_of(location: str, doing: str) -> Iterator[None]:
    """Raise failures of a request as OSErrors, as ``interface.Store`` promises."""
    try:
        yield
    except BaseException as error:
        if not is_request_failure(error):
            raise
        failure = object_failure(error, doing, location)
        raise OSError(failure.errno or errno.EIO, failure.message, location) from error
