"""Makes obstore's clients for the stores that URLs name: endpoint, credentials, tries and timeouts."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from ...errors import CheckpointError
from ...escaping import redacted
from .authorities import ca_bundle
from .aws_credentials import provider_of
from .aws_profile import profile_keys
from .endpoints import aws_endpoint, endpoint_of, is_access_point, is_express, sts_endpoint
from .url import ObjectUrl

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from ...settings import LoaderSettings

_FIRST_PAUSE = timedelta(milliseconds=100)
_LONGEST_PAUSE = timedelta(seconds=5)
_CONNECT_S = 5.0
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_first_process: list[int] = []


@dataclass(frozen=True)
class ObjectStoreOptions:
    """How object stores are reached and read; the settings ``object_store_…`` say what each means.

    Attributes:
        profile: the AWS profile whose keys are used, whatever the environment says; None: the usual order.
    """

    range_bytes: int = 8 << 20
    timeout_s: float = 30.0
    max_tries: int = 5
    endpoint_url: str | None = None
    region: str | None = None
    anonymous: bool = False
    virtual_host: bool = False
    profile: str | None = None

    @classmethod
    def from_settings(cls, settings: LoaderSettings) -> Self:
        """The options that the settings give; they name no profile."""
        return cls(
            range_bytes=int(settings.object_store_range_bytes),
            timeout_s=settings.object_store_timeout_s,
            max_tries=settings.max_tries,
            endpoint_url=settings.object_store_endpoint_url,
            region=settings.object_store_region,
            anonymous=settings.object_store_anonymous,
            virtual_host=settings.object_store_virtual_host,
        )


def condition_of(tag: str | None) -> str | None:
    """The If-Match of further requests for an object with this ETag; None: a weak one never fulfils it (RFC 9110)."""
    return tag if tag and not tag.startswith("W/") else None


def require_obstore() -> None:
    """Check that the client is installed.

    Raises:
        CheckpointError: it is not; the message says how to install it.
    """
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"object stores are read by obstore, which cannot be imported: {error}",
            hint="pip install 'engine-loader[s3]'",
        ) from None


def make_client(url: ObjectUrl, options: ObjectStoreOptions) -> ObjectStore:
    """A client for the bucket of ``url``. Nothing is sent yet.

    Raises:
        CheckpointError: obstore is not installed, or cannot make sense of the configuration.
    """
    require_obstore()
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore, S3Store

    kind: type[Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[url.scheme]
    endpoint = endpoint_of(url, options)
    config = _config(url, options, endpoint)
    bundle = ca_bundle() if url.scheme == "s3" else None
    if options.anonymous:
        config["skip_signature"] = True
    try:
        store: ObjectStore = kind(
            url.bucket,
            client_options={
                "allow_http": endpoint is not None and endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=min(_CONNECT_S, options.timeout_s)),
                "read_timeout": timedelta(seconds=options.timeout_s),
                # For a whole request; read_timeout notices a server that hangs.
                "timeout": timedelta(seconds=10 * options.timeout_s),
                "user_agent": "engine-loader",
                **({"root_certificate": bundle} if bundle else {}),
            },
            retry_config={
                "max_retries": options.max_tries - 1,
                "backoff": {"init_backoff": _FIRST_PAUSE, "max_backoff": _LONGEST_PAUSE, "base": 2},
                "retry_timeout": timedelta(seconds=10 * options.timeout_s),
            },
            **config,
        )
    except (BaseError, ValueError) as error:
        message = redacted(str(error).partition("\n")[0])
        raise CheckpointError(
            f"the object store cannot be reached as configured: {message}",
            file=f"{url.scheme}://{url.bucket}",
            hint="for az://, AZURE_STORAGE_ACCOUNT_NAME must be set" if url.scheme == "az" else None,
        ) from None
    return store


class ObjectStores:
    """The clients of several buckets, each made when it is first asked for. May be used from several threads.

    Pickling keeps the options; the copy makes clients of its own.

    Args:
        options: how they are reached and read.
        client: used for every bucket, instead of clients made from ``options``.

    Attributes:
        foreign: whether ``client`` was given: only obstore knows how it authenticates.
    """

    def __init__(self, options: ObjectStoreOptions, *, client: ObjectStore | None = None) -> None:
        self.options = options
        self._client = client
        self.foreign = client is not None
        self._clients: dict[tuple[str, str], ObjectStore] = {}
        self._lock = threading.Lock()

    def client(self, url: ObjectUrl) -> ObjectStore:
        """The client for the bucket of ``url``.

        Raises:
            CheckpointError: as ``make_client``.
        """
        if self._client is not None:
            return self._client
        with self._lock:
            bucket = (url.scheme, url.bucket)
            if bucket not in self._clients:
                self._clients[bucket] = make_client(url, self.options)
            return self._clients[bucket]

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_stores, (self.options, self._client))


def _rebuild_stores(options: ObjectStoreOptions, client: ObjectStore | None) -> ObjectStores:
    return ObjectStores(options, client=client)


def check_process(path: str) -> None:
    """Raise CheckpointError in a child of a process that has used obstore: its threads do not survive a fork."""
    if not _first_process:
        _first_process.append(os.getpid())
    if os.getpid() != _first_process[0]:
        raise CheckpointError(
            "object stores cannot be used in a process that was forked from one that has used them",
            file=path,
            hint="start it by spawn or forkserver",
        )


def _config(url: ObjectUrl, options: ObjectStoreOptions, endpoint: str | None) -> dict[str, Any]:
    """Options of one kind of store; obstore takes those that are missing from the environment."""
    if url.scheme != "s3":
        name = "base_url" if url.scheme == "gs" else "endpoint"
        return {} if endpoint is None else {name: endpoint}
    keys = {} if options.anonymous else profile_keys(profile=options.profile)
    region = options.region or next(filter(None, map(os.environ.get, _REGIONS)), None) or keys.get("region")
    region = region or "us-east-1"
    config: dict[str, Any] = {
        "region": region,
        # Otherwise one object, too, is deleted by DeleteObjects, which not every server has.
        "disable_bulk_delete": True,
        "s3_express": endpoint is None and is_express(url.bucket),
        **_address(url.bucket, region, options, endpoint),
    }
    provider = None if options.anonymous else provider_of(keys, sts_endpoint(region))
    if provider is not None:
        config["credential_provider"] = provider
    return config


def _address(bucket: str, region: str, options: ObjectStoreOptions, endpoint: str | None) -> dict[str, Any]:
    """Where requests go. What obstore would derive itself knows one domain of AWS only."""
    virtual_host = options.virtual_host or (endpoint is None and is_access_point(bucket))
    if endpoint is None:
        endpoint = aws_endpoint(region, bucket=bucket)
        if is_express(bucket):
            # obstore has the host of a directory bucket from its name; an endpoint of the environment was found empty.
            return {}
    # obstore wants the bucket in the endpoint when it is the host's first part.
    host = re.sub("(?<=://)", f"{bucket}.", endpoint, count=1) if virtual_host else endpoint
    # Of obstore's two options the more specific one: AWS_ENDPOINT_URL_S3 would override the other.
    return {"virtual_hosted_style_request": virtual_host, "aws_endpoint_url_s3": host}
