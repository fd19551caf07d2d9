"""Where a server sends requests for a bucket. obstore follows redirects and, to another host, sends no signature there:
what it reports is that access was denied.
"""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit
from urllib.request import getproxies_environment

from ...errors import TransferError
from .authorities import tls_context
from .request_failures import Answer, object_failure

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_TIMEOUT_S = 5.0
_REDIRECTS = (301, 302, 303, 307, 308)


def request_failure(
    store: ObjectStore, key: str, error: BaseException, doing: str, path: str, offset: int | None = None
) -> TransferError:
    """``object_failure``, for which a refusal by another host is told from one by the server itself."""
    refused = Answer.of(error).status in (301, 302, 307, 308, 401, 403)
    return object_failure(error, doing, path, offset, elsewhere=_redirect_of(store, key) if refused else None)


def _redirect_of(store: ObjectStore, key: str) -> str | None:
    """Ask, without signature, where the server sends requests for ``key``, e.g. "host (region eu-west-1)".

    None: it does not send elsewhere, or that is not known.
    """
    config = cast("dict[str, Any]", getattr(store, "config", {}))
    address = config.get("endpoint_url_s3")
    if not address or getproxies_environment():
        return None
    parts = urlsplit(str(address))
    bucket = "" if config.get("virtual_hosted_style_request") in (True, "true") else f"/{config['bucket']}"
    try:
        return _ask(parts.scheme, parts.netloc, f"{parts.path}{bucket}/{quote(key)}")
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
