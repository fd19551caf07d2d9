"""Uploads an object that is written as a stream: in parts while it grows, published atomically when it is complete."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..errors import CheckpointError
from ..sources.object_store.client import check_process
from ..sources.object_store.redirects import request_failure
from ..sources.object_store.request_failures import is_failure

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from obstore.store import ObjectStore

MAX_PARTS = 10_000
"""The most parts that S3 allows for an upload."""
_LOOK_S = 0.2


class _Abandoned(Exception):
    """Makes the client cancel an upload and delete the parts that have arrived."""


class ObjectUpload(io.BufferedIOBase):
    """A writable stream. ``close``, or the end of a ``with`` block without an exception, publishes the object.

    An exception in the block, ``abandon`` and garbage collection of an open stream cancel the upload: an object of the
    same name stays unchanged. Content that fits one part is sent by one request, longer content in parts, several at
    once.

    Args:
        store: the client of the bucket.
        key: of the object, in the bucket.
        path: URL of the object, for messages.
        part_bytes: bytes of a part.
        parts_at_once: parts in flight. Two more parts are in memory: one is being filled, and one waits.

    Raises:
        CheckpointError: (from ``write`` and ``close``) the server refuses or fails; nothing was published.
    """

    def __init__(self, store: ObjectStore, key: str, path: str, *, part_bytes: int, parts_at_once: int) -> None:
        self._store, self._key, self._path = store, key, path
        self._part_bytes, self._parts_at_once = part_bytes, parts_at_once
        self._part = bytearray()
        self._position = 0
        self._full: queue.Queue[bytearray | None] = queue.Queue(1)
        self._thread: threading.Thread | None = None
        self._abandoned = False
        self._failure: BaseException | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: ReadableBuffer) -> int:
        if self.closed:
            raise ValueError("write to a closed upload")
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            if len(self._part) == self._part_bytes:
                self._hand_over(self._part)
                self._part = bytearray()
            piece = view[done : done + self._part_bytes - len(self._part)]
            self._part += piece
            done += len(piece)
        self._position += done
        return done

    def close(self) -> None:
        """Publish the object."""
        if self.closed:
            return
        try:
            self._publish()
        finally:
            self._end()

    def abandon(self) -> None:
        """Cancel the upload; parts that have arrived are deleted. Does nothing after ``close`` or ``abandon``."""
        if self.closed:
            return
        self._abandoned = True
        if self._thread is not None:
            self._thread.join()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self.abandon()
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            # After a write that failed, torch.save raises only that the file has the wrong length.
            self._check()

    def __del__(self) -> None:
        # io's streams call close() when they are garbage: that would publish an object that is not complete.
        if hasattr(self, "_failure"):
            self.abandon()

    def _end(self) -> None:
        self._part = bytearray()
        super().close()

    def _publish(self) -> None:
        if self._thread is None:
            self._send(self._part)
        else:
            self._hand_over(self._part)
            self._hand_over(None)
            self._thread.join()
        self._check()

    def _hand_over(self, part: bytearray | None) -> None:
        """Give a part to the upload thread; blocks while another part waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, args=(self._parts(),), name="engine-loader-upload")
            self._thread.daemon = True
            self._thread.start()
        while True:
            self._check()
            try:
                self._full.put(part, timeout=_LOOK_S)
                return
            except queue.Full:
                continue

    def _parts(self) -> Iterator[bytearray]:
        for _ in range(MAX_PARTS):
            part = self._next_part()
            if part is None:
                return
            yield part
        if self._next_part() is not None:
            raise CheckpointError(
                f"the object would have more than {MAX_PARTS} parts of {self._part_bytes} bytes",
                file=self._path,
                hint="raise part_size of S3ClientConfig, or write more files (thread_count)",
            )

    def _next_part(self) -> bytearray | None:
        while not self._abandoned:
            try:
                return self._full.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
        raise _Abandoned

    def _send(self, content: bytearray | Iterator[bytearray]) -> None:
        """Upload, in one request or in parts. A failure is kept, and ``_check`` raises it in the writing thread."""
        import obstore

        try:
            check_process(self._path)
            if isinstance(content, bytearray):
                obstore.put(self._store, self._key, content, use_multipart=False)
            else:
                sizes: dict[str, Any] = {"chunk_size": self._part_bytes, "max_concurrency": self._parts_at_once}
                obstore.put(self._store, self._key, content, use_multipart=True, **sizes)
        except _Abandoned:
            return
        except BaseException as error:
            self._failure = error

    def _check(self) -> None:
        """Raise the error with which the upload failed, if it failed."""
        error = self._failure
        if error is None:
            return
        if isinstance(error, CheckpointError) or not is_failure(error):
            raise error
        raise request_failure(self._store, self._key, error, "write the object", self._path) from error
