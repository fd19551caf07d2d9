"""The requests of an S3 file system that are made by s3torchconnector's client, where a user gave one."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote

from ..sources.object_store.url import ObjectUrl

_NOT_FOUND = "Service error: The object was not found"


@runtime_checkable
class S3Client(Protocol):
    """What is asked of s3torchconnector's ``S3Client``, or of an object with its interface."""

    get_object: Callable[..., AbstractContextManager[io.BufferedIOBase]]
    put_object: Callable[..., AbstractContextManager[io.BufferedIOBase]]
    head_object: Callable[..., Any]
    delete_object: Callable[..., None]
    copy_object: Callable[..., None]


class GivenClient:
    """Makes requests by a client that has the interface of s3torchconnector's. Its exceptions are passed on.

    Args:
        client: the client.
        reader_constructor: s3torchconnector's way of reading an object; None: the client's default.
    """

    def __init__(self, client: S3Client, reader_constructor: Any | None) -> None:
        self._client = client
        self._reader_constructor = reader_constructor

    def reading(self, url: ObjectUrl) -> AbstractContextManager[io.BufferedIOBase]:
        """A stream to read an object."""
        return self._client.get_object(url.bucket, url.key, reader_constructor=self._reader_constructor)

    def writing(self, url: ObjectUrl) -> AbstractContextManager[io.BufferedIOBase]:
        """A stream to write an object, published when its block ends without an exception."""
        return self._client.put_object(url.bucket, url.key)

    def copy(self, url: ObjectUrl, new_url: ObjectUrl) -> None:
        """Copy an object on the server. The source's key goes into a header, so it is percent-encoded."""
        self._client.copy_object(
            src_bucket=url.bucket, src_key=quote(url.key), dst_bucket=new_url.bucket, dst_key=new_url.key
        )

    def exists(self, url: ObjectUrl) -> bool:
        """Whether there is an object."""
        try:
            self._client.head_object(url.bucket, url.key)
        except Exception as error:
            # S3Exception has no code: s3torchconnector itself tells a missing object by this text.
            if str(error) != _NOT_FOUND:
                raise
            return False
        return True

    def delete(self, url: ObjectUrl) -> None:
        """Delete an object."""
        self._client.delete_object(url.bucket, url.key)
