"""Where a server sends requests for a bucket. obstore follows redirects and, to another host, sends no signature there:
what it reports is that access was denied.
"""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit
from urllib.request import getproxies_environment

from .authorities import tls_context
from .url import ObjectUrl

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_TIMEOUT_S = 5.0
_REDIRECTS = (301, 302, 303, 307, 308)


def redirect_of(store: ObjectStore, url: ObjectUrl) -> str | None:
    """Ask, without signature, where the server sends requests for ``url``: "host (region eu-west-1)"; None where
    it does not send elsewhere, or that is not known.
    """
    config = cast("dict[str, Any]", getattr(store, "config", {}))
    address = config.get("aws_endpoint_url_s3") or config.get("endpoint_url_s3")
    if url.scheme != "s3" or not address or getproxies_environment():
        return None
    parts = urlsplit(str(address))
    bucket = "" if config.get("virtual_hosted_style_request") in (True, "true") else f"/{url.bucket}"
    try:
        return _ask(parts.scheme, parts.netloc, f"{parts.path}{bucket}/{quote(url.key)}")
    except (OSError, http.client.HTTPException, ValueError):
        return None


def _ask(scheme: str, host: str, path: str) -> str | None:
    connection = (
        http.client.HTTPSConnection(host, timeout=_TIMEOUT_S, context=tls_context())
        if scheme == "https"
        else http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
    )
    try:
        connection.request("GET", path, headers={"User-Agent": "engine-loader", "Range": "bytes=0-0"})
        answer = connection.getresponse()
        if answer.status not in _REDIRECTS:
            return None
        other = urlsplit(answer.getheader("Location", "")).hostname or "another host"
        region = answer.getheader("x-amz-bucket-region")
        return f"{other} (region {region})" if region else other
    finally:
        connection.close()
