"""Options of the S3 client of this package's DCP classes, with the names that s3torchconnector gives them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..settings import LoaderSettings, load_settings
from ..sources.object_store.client import ObjectStoreOptions

MIN_PART_BYTES = 5 << 20
"""The least that S3 allows for a part of an upload, except for the last part."""
_MAX_PART_BYTES = 5 << 30
_MAX_RANGE_BYTES = 1 << 30
# AWS recommends one request in flight for each 85 to 90 MB/s: 16 requests for 10 Gbit/s.
_GBPS_PER_REQUEST = 0.625
_MAX_REQUESTS = 256


@dataclass(frozen=True)
class S3ClientConfig:
    """Options of the client. Classes that get no config use the loader's settings (``object_store_…``, ``max_tries``).

    Attributes:
        throughput_target_gbps: Gbit/s; decides how many requests are in flight at once, e.g. 16 for 10 Gbit/s.
        part_size: bytes of a part that is uploaded, and of the longest range that is requested (up to 1 GiB). An object
            that would have more than 10,000 parts gets larger parts.
        unsigned: send requests without signature, for public buckets.
        force_path_style: ``https://host/bucket/key``, the default of the settings; True overrides
            ``object_store_virtual_host``.
        max_attempts: how often a request is tried.
        profile: the AWS profile whose keys are used; it overrides keys of the environment.
        endpoint_url: the server's address; None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or the endpoint of AWS.

    Raises:
        ValueError: a value is out of its range.
    """

    throughput_target_gbps: float = 10.0
    part_size: int = 8 << 20
    unsigned: bool = False
    force_path_style: bool = False
    max_attempts: int = 10
    profile: str | None = None
    endpoint_url: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.throughput_target_gbps < math.inf:
            raise ValueError(f"throughput_target_gbps is {self.throughput_target_gbps}; it must be positive")
        if not MIN_PART_BYTES <= self.part_size <= _MAX_PART_BYTES:
            raise ValueError(f"part_size is {self.part_size}; it must be 5 MiB to 5 GiB")
        if not 1 <= self.max_attempts <= 100:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be 1 to 100")

    def as_options(self) -> dict[str, Any]:
        """The loader's settings, by name, to which these options correspond."""
        requests = math.ceil(self.throughput_target_gbps / _GBPS_PER_REQUEST)
        options: dict[str, Any] = {
            "object_store_requests": min(requests, _MAX_REQUESTS),
            "object_store_range_bytes": min(self.part_size, _MAX_RANGE_BYTES),
            "max_tries": self.max_attempts,
        }
        if self.unsigned:
            options["object_store_anonymous"] = True
        if self.force_path_style:
            options["object_store_virtual_host"] = False
        if self.endpoint_url is not None:
            options["object_store_endpoint_url"] = self.endpoint_url
        return options


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
    def of(cls, region: str | None, config: S3ClientConfig | None, options: Mapping[str, Any]) -> S3Setup:
        """The setup for the arguments of a class; ``options`` override ``config``, and both override the environment.

        Raises:
            SettingsError: an option is unknown or has a bad value.
        """
        configured = {} if config is None else config.as_options()
        # A setting of None is ignored.
        settings = load_settings(
            {"object_store_region": region or None, **configured, **options}, extra_origin="the arguments"
        ).settings.loader
        client = dataclasses.replace(
            ObjectStoreOptions.from_settings(settings), profile=config.profile if config else None
        )
        part_bytes = config.part_size if config else max(MIN_PART_BYTES, int(settings.object_store_range_bytes))
        return cls(settings, client, part_bytes)
