"""Options of the S3 client of this package's DCP classes, with the names that s3torchconnector gives them."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..settings import LoaderSettings, load_settings
from ..sources.object_store.client import ObjectStoreOptions

if TYPE_CHECKING:
    from s3torchconnector import S3ClientConfig as TheirClientConfig

logger = logging.getLogger(__name__)

MIN_PART_BYTES = 5 << 20
"""The least that S3 allows for a part of an upload, except for the last part."""
_MAX_PART_BYTES = 5 << 30
_MAX_RANGE_BYTES = 1 << 30
# AWS recommends one request in flight for each 85 to 90 MB/s: 16 requests for 10 Gbit/s.
_GBPS_PER_REQUEST = 0.625
_MAX_REQUESTS = 256
_MAX_TRIES = 100


@dataclass(frozen=True)
class S3ClientConfig:
    """Options of the client. Classes that get no config use the loader's settings (``object_store_…``, ``max_tries``).

    Any values are taken here, as by s3torchconnector's class of this name. Where a client is made of them, sizes and
    numbers of tries outside the ranges below become the nearest ones within.

    Attributes:
        throughput_target_gbps: Gbit/s; decides how many requests are in flight at once, e.g. 16 for 10 Gbit/s.
        part_size: bytes of a part that is uploaded, 5 MiB to 5 GiB, and of the longest range that is requested (up to
            1 GiB). An object that would have more than 10,000 parts gets larger parts.
        unsigned: send requests without signature, for public buckets.
        force_path_style: ``https://host/bucket/key``, the default of the settings; True overrides
            ``object_store_virtual_host``.
        max_attempts: how often a request is tried, 1 to 100.
        profile: the AWS profile whose keys are used; it overrides keys of the environment.
        endpoint_url: the server's address; None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or the endpoint of AWS.
    """

    throughput_target_gbps: float = 10.0
    part_size: int = 8 << 20
    unsigned: bool = False
    force_path_style: bool = False
    max_attempts: int = 10
    profile: str | None = None
    endpoint_url: str | None = None

    @classmethod
    def of(cls, config: AnyClientConfig) -> S3ClientConfig:
        """This package's class from it or from s3torchconnector's class of this name.

        Raises:
            TypeError: ``config`` is neither.
        """
        if isinstance(config, cls):
            return config
        try:
            return cls(**{field.name: getattr(config, field.name) for field in _THEIR_FIELDS})
        except AttributeError as error:
            raise TypeError(
                f"s3client_config is {type(config).__name__}, neither this package's S3ClientConfig nor "
                f"s3torchconnector's: {error}"
            ) from None

    def as_options(self) -> dict[str, Any]:
        """The loader's settings, by name, to which these options correspond.

        Raises:
            ValueError: ``throughput_target_gbps`` is not positive.
        """
        if not 0 < self.throughput_target_gbps < math.inf:
            raise ValueError(f"throughput_target_gbps is {self.throughput_target_gbps}; it must be positive")
        requests = math.ceil(self.throughput_target_gbps / _GBPS_PER_REQUEST)
        options: dict[str, Any] = {
            "object_store_requests": min(requests, _MAX_REQUESTS),
            "object_store_range_bytes": min(self.part_bytes(), _MAX_RANGE_BYTES),
            "max_tries": _within("max_attempts", self.max_attempts, 1, _MAX_TRIES),
        }
        if self.unsigned:
            options["object_store_anonymous"] = True
        if self.force_path_style:
            options["object_store_virtual_host"] = False
        if self.endpoint_url is not None:
            options["object_store_endpoint_url"] = self.endpoint_url
        return options

    def part_bytes(self) -> int:
        """``part_size``, or the nearest size that S3 allows."""
        return _within("part_size", self.part_size, MIN_PART_BYTES, _MAX_PART_BYTES)


AnyClientConfig: TypeAlias = "S3ClientConfig | TheirClientConfig"
"""Options of the client: this package's class, or s3torchconnector's of the same name."""
_THEIR_FIELDS = [field for field in dataclasses.fields(S3ClientConfig) if field.name != "endpoint_url"]


def _within(name: str, value: int, least: int, most: int) -> int:
    nearest = min(max(value, least), most)
    if nearest != value:
        logger.debug("%s is %s; S3 and this package take %s to %s: %s is used", name, value, least, most, nearest)
    return nearest


@dataclass(frozen=True)
class S3Setup:
    """The settings that result from region, config and options.

    Attributes:
        settings: of the loader, for reading.
        client: options of the object store's client.
        part_bytes: the least size of a part of an upload, except for the last part.
    """

    settings: LoaderSettings
    client: ObjectStoreOptions
    part_bytes: int

    @classmethod
    def of(cls, region: str | None, given: AnyClientConfig | None, options: Mapping[str, Any]) -> S3Setup:
        """The setup for the arguments of a class; ``options`` override the config that was given, and both override
        the environment.

        Raises:
            SettingsError: an option is unknown or has a bad value.
            ValueError: ``throughput_target_gbps`` is not positive.
            TypeError: the config is of another kind.
        """
        config = None if given is None else S3ClientConfig.of(given)
        configured = {} if config is None else config.as_options()
        # A setting of None is ignored.
        settings = load_settings(
            {"object_store_region": region or None, **configured, **options}, extra_origin="the arguments"
        ).settings.loader
        client = dataclasses.replace(
            ObjectStoreOptions.from_settings(settings), profile=config.profile if config else None
        )
        part_bytes = config.part_bytes() if config else max(MIN_PART_BYTES, int(settings.object_store_range_bytes))
        return cls(settings, client, part_bytes)
