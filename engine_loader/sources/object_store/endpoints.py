"""Hosts of object stores: endpoints that are configured, and those of AWS by region and options."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ...errors import CheckpointError
from .url import ObjectUrl

if TYPE_CHECKING:
    from .client import ObjectStoreOptions

_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_DOMAINS = {
    "cn-": "amazonaws.com.cn",
    "us-iso-": "c2s.ic.gov",
    "us-isob-": "sc2s.sgov.gov",
    "us-isof-": "csp.hci.ic.gov",
    "eu-isoe-": "cloud.adc-e.uk",
    "eusc-": "amazonaws.eu",
}
"""Domains of AWS by the beginning of a region's name; others, GovCloud among them, are amazonaws.com."""


def endpoint_of(url: ObjectUrl, options: ObjectStoreOptions) -> str | None:
    """The endpoint that is configured for a URL's store; None for that of AWS, Google or Azure.

    Raises:
        CheckpointError: it is not an address of a server, as ``localhost:9000`` without ``http://``.
    """
    origin, endpoint = "object_store_endpoint_url", options.endpoint_url
    if endpoint is None and url.scheme == "s3":
        origin = next((name for name in _VARIABLES if os.environ.get(name)), "")
        endpoint = os.environ.get(origin)
    if not endpoint:
        return None
    problem = _problem(endpoint)
    if problem is not None:
        shown = re.sub("[^/@]*@", "", endpoint)
        bare = shown.partition("://")[2] or shown
        raise CheckpointError(
            f"{origin} is {shown!r}: {problem}",
            file=f"{url.scheme}://{url.bucket}",
            hint=f"write http:// or https:// before the server's name, as https://{bare.strip() or 'host:9000'}",
        )
    return endpoint.rstrip("/")


def is_express(bucket: str) -> bool:
    """Whether a bucket's name is that of a directory bucket (S3 Express One Zone)."""
    return bucket.endswith("--x-s3")


def is_access_point(bucket: str) -> bool:
    """Whether a bucket's name is the alias of an access point, which has virtual hosts only."""
    return bucket.endswith(("-s3alias", "--ol-s3"))


def aws_endpoint(region: str, *, bucket: str) -> str:
    """The address of S3 in a region, without the bucket; AWS_USE_FIPS_ENDPOINT and AWS_USE_DUALSTACK_ENDPOINT are
    heeded.

    Raises:
        CheckpointError: a directory bucket is asked for by a FIPS or a dual-stack endpoint.
    """
    fips, dual_stack = _is_set("AWS_USE_FIPS_ENDPOINT"), _is_set("AWS_USE_DUALSTACK_ENDPOINT")
    if is_express(bucket) and (fips or dual_stack):
        raise CheckpointError(
            "FIPS and dual-stack endpoints of S3 Express are not served",
            file=f"s3://{bucket}",
            hint="unset AWS_USE_FIPS_ENDPOINT and AWS_USE_DUALSTACK_ENDPOINT, or read the objects from another bucket",
        )
    host = ".".join(["s3-fips" if fips else "s3", *(["dualstack"] if dual_stack else []), region])
    return f"https://{host}.{domain_of(region)}"


def sts_endpoint(region: str) -> str:
    """The address of the service that gives credentials for a web identity in a region.

    ``AWS_STS_ENDPOINT`` and ``AWS_ENDPOINT_URL_STS`` override it.
    """
    given = os.environ.get("AWS_STS_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL_STS")
    # In GovCloud the ordinary host of STS is the FIPS one.
    fips = _is_set("AWS_USE_FIPS_ENDPOINT") and not region.startswith("us-gov-")
    return given or f"https://sts{'-fips' if fips else ''}.{region}.{domain_of(region)}"


def domain_of(region: str) -> str:
    """The domain of AWS to which a region belongs, e.g. ``amazonaws.com.cn``."""
    return next((domain for prefix, domain in _DOMAINS.items() if region.startswith(prefix)), "amazonaws.com")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("true", "1")


def _problem(endpoint: str) -> str | None:
    """What keeps an endpoint from being a server's address; obstore panics on some of these."""
    if not re.match("https?://[^/]", endpoint):
        return "an address begins with http:// or https:// and the server's name"
    if re.search(r"[\s\x00-\x1f\x7f?#]", endpoint):
        return "there is white space, '?' or '#' in it"
    try:
        parts = urlsplit(endpoint)
        found = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        return str(error)
    return None if found else "it names no server"
