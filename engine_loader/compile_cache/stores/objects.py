"""A store in an object store's bucket: s3://bucket/prefix, gs://, az://.

Endpoint, region and credentials are those of the environment (docs/object-storage.md).
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...sources.object_store.client import ObjectStoreOptions, condition_of, make_client
from ...sources.object_store.request_failures import is_request_failure, object_failure
from ...sources.object_store.url import parse_object_url
from ..cache_errors import CacheValidationError
from ..space import no_room_is_an_interruption
from ..trust import Trust
from .interface import PackReplacedError, Small, Stored
from .joined import JoinedReads
from .marker import MarkedStore
from .object_names import MARKER, SAVING, UNFINISHED, is_key, kind_of

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

# A larger pack goes up in parts, and those cannot be sent on the condition that the name is free.
_WHOLE_BYTES = 64 << 20
_JUST_NOW_S = 5.0


class ObjectCacheStore(MarkedStore):
    """Packs as objects below ``url``.

    A pack is written to a temporary file, and put under its content hash when it is complete. Servers that ignore the
    condition of a put (that the name is free) are asked before it; a reader holds what it opened by its ETag.

    Args:
        url: of a prefix.
        trust: what is taken from it.
        work_directory: for the temporary file; None: the temporary directory.
        store_name: that the store must have; None: any.
        options: how patiently it is asked; None: the defaults.

    Raises:
        CacheValidationError: packs are not signed and trust is not "anyone" (who may write to a bucket cannot be
            checked), or obstore is not installed.
    """

    def __init__(
        self,
        url: str,
        trust: Trust,
        work_directory: str | None = None,
        store_name: str | None = None,
        options: ObjectStoreOptions | None = None,
    ) -> None:
        super().__init__(store_name)
        if not trust.signed and not trust.anyone:
            raise CacheValidationError(
                f"{url}: refused: an object store does not say who else may write to it, and caches are code; "
                "sign packs with compile_cache.key_file, or allow it with compile_cache.trust=anyone"
            )
        try:
            location = parse_object_url(url)
            self._store = make_client(location, options or ObjectStoreOptions())
        except CheckpointError as error:
            raise CacheValidationError(f"compile_cache.directory: {error}") from None
        self.description = url.rstrip("/")
        self.unreadable: list[str] = []
        self._prefix = f"{location.key}/" if location.key else ""
        self._work_directory = work_directory
        self._listed: dict[str, Stored] = {}
        self._written: dict[str, float] = {}
        self._versions: dict[str, str] = {}

    def is_empty(self) -> bool:
        import obstore

        with _errors_of(self.description, "list the store"):
            for metas in obstore.list(self._store, self._prefix or None, chunk_size=50):
                names = [self._stored(meta).name for meta in metas]
                if any(name != MARKER and kind_of(name) != "unfinished" for name in names):
                    return False
        return True

    def entries(self, prefix: str = "") -> list[Stored]:
        import obstore

        if prefix and prefix != SAVING and not is_key(prefix):
            return []
        below = f"{self._prefix}{prefix}/" if prefix else self._prefix
        found: list[Stored] = []
        with _errors_of(self.description, "list the store"):
            for metas in obstore.list(self._store, below or None, chunk_size=1000):
                found += [self._stored(meta) for meta in metas]
        found = sorted((stored for stored in found if stored.kind != "foreign"), key=lambda stored: stored.name)
        for stored in found:
            self._clock.listed(stored.modified)
            self._listed[stored.name] = stored
        return found

    def was_listed(self, name: str) -> bool:
        return name in self._listed

    @contextmanager
    def open(self, name: str) -> Iterator[_Object]:
        # A listing says what else a request would have to ask.
        stored = self._listed.get(name) or self._head(name)
        yield _Object(self._store, f"{self.description}/{name}", self._prefix + name, stored)

    def read(self, name: str, most_bytes: int) -> Small:
        import obstore

        location = f"{self.description}/{name}"
        with _errors_of(location, "read the object"):
            answer = obstore.get(self._store, self._prefix + name)
            stored = self._stored(answer.meta)
            if time.monotonic() - self._written.pop(name, -_JUST_NOW_S) < _JUST_NOW_S:
                self._clock.wrote(stored.modified)
            if stored.size > most_bytes:
                raise CacheValidationError(f"{location}: refused: it has {stored.size} bytes, more than {most_bytes}")
            return Small(stored, bytes(answer.bytes()))

    def create(self, name: str, content: bytes) -> bool:
        with suppress(FileNotFoundError):  # for servers that ignore the condition
            self._head(name)
            return False
        return self._put(name, content, "create")

    def replace(self, name: str, content: bytes, version: str | None = None) -> bool:
        if version is None:
            return self._put(name, content, "overwrite")
        if not condition_of(version):
            return False
        with suppress(FileNotFoundError):
            if self._head(name).version != version:
                return False
        return self._put(name, content, {"e_tag": version})

    def vouch(self, stored: Stored) -> None:
        return

    @contextmanager
    def upload(self, prefix: str) -> Iterator[_Upload]:
        self.found()
        directory = Path(self._work_directory or tempfile.gettempdir()).expanduser()
        with no_room_is_an_interruption(directory):
            handle, path = tempfile.mkstemp(prefix="engine-loader-pack-", dir=directory)
            upload = _Upload(self, handle, path)
            try:
                yield upload
            finally:
                upload.close()

    def delete(self, name: str) -> None:
        import obstore

        if kind_of(name) == "foreign":
            raise ValueError(f"{name}: is not a name of a store's own objects")
        self._listed.pop(name, None)
        try:
            with _errors_of(f"{self.description}/{name}", "delete the object"):
                obstore.delete(self._store, self._prefix + name)
        except FileNotFoundError:
            return

    def make_room(self, coming: int) -> None:
        return

    def put(self, name: str, path: str) -> Stored | None:
        """Upload a file; what it is there. None where the name exists: its content is equal, and it stays.

        Raises:
            OSError: the server refuses it, or fails.
        """
        with suppress(FileNotFoundError):
            self._head(name)
            return None
        size = os.path.getsize(path)
        self._put(name, Path(path), "create" if size <= _WHOLE_BYTES else "overwrite")
        return None if not (version := self._versions.pop(name, "")) else Stored(name, size, time.time(), version)

    def _put(self, name: str, content: bytes | Path, mode: Any) -> bool:
        """Whether it was written; False when the condition in ``mode`` was not met."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, GenericError, NotSupportedError, PreconditionError

        key = self._prefix + name
        self._listed.pop(name, None)
        with _errors_of(f"{self.description}/{name}", "write the object"):
            try:
                answer = obstore.put(self._store, key, content, mode=mode)
                self._written[name] = time.monotonic()
                self._versions[name] = answer["e_tag"] or ""
                return True
            except (AlreadyExistsError, PreconditionError):
                return False
            except NotSupportedError:
                pass
            except GenericError as error:
                if mode == "overwrite" or "501" not in str(error):
                    raise
            except FileNotFoundError:  # the object of the condition is gone
                if not isinstance(mode, Mapping):
                    raise
                return False
            obstore.put(self._store, key, content)  # a server that knows no conditions
            return True

    def _head(self, name: str) -> Stored:
        import obstore

        with _errors_of(f"{self.description}/{name}", "open the object"):
            return self._stored(obstore.head(self._store, self._prefix + name))

    def _measure(self) -> float:
        name = f"{UNFINISHED}{uuid.uuid4().hex}"
        self._put(name, b"?", "overwrite")
        try:
            return self._head(name).modified
        finally:
            self.delete(name)

    def _stored(self, meta: ObjectMeta) -> Stored:
        name = meta["path"].removeprefix(self._prefix)
        return Stored(name, meta["size"], meta["last_modified"].timestamp(), meta["e_tag"] or "")


class _Object:
    def __init__(self, store: ObjectStore, location: str, key: str, stored: Stored) -> None:
        self.size = stored.size
        self._store, self._location, self._key = store, location, key
        self._if_match = condition_of(stored.version)
        self._joined = JoinedReads(self._fetch)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._joined.expect(ranges)

    def read(self, offset: int, size: int) -> bytes:
        return self._joined.read(offset, size) if size else b""

    def _fetch(self, offset: int, size: int) -> bytes:
        import obstore
        from obstore.exceptions import PreconditionError

        options: GetOptions = {"range": (offset, offset + size), "if_match": self._if_match}
        with _errors_of(self._location, "read the pack"):
            try:
                content = bytes(obstore.get(self._store, self._key, options=options).bytes())
            except PreconditionError:
                raise PackReplacedError(self._location) from None
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

    def commit(self, name: str) -> Stored | None:
        self._file.flush()
        return self._store.put(name, self._path)

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
    except PackReplacedError:
        raise
    except BaseException as error:
        if not is_request_failure(error):
            raise
        failure = object_failure(error, doing, location)
        raised = OSError(failure.errno or errno.EIO, failure.message, location)
        if failure.hint:
            raised.add_note(failure.hint)
        raise raised from error
