"""URLs of objects and of prefixes: s3://bucket/key, gs://bucket/key, az://container/key."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import CheckpointError

SCHEMES = ("s3", "gs", "az")
_URL = re.compile(rf"({'|'.join(SCHEMES)})://([^/]*)(?:/(.*))?", re.DOTALL)
# What str(pathlib.Path("s3://bucket/key")) gives.
_FLATTENED = re.compile(rf"({'|'.join(SCHEMES)}):/[^/]")

_ARN_HINT = (
    "give the access point's alias as the bucket (s3://…-s3alias/key); a multi-region access point has none: give one "
    "of its buckets"
)


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """A URL in its parts.

    Attributes:
        scheme: one of SCHEMES.
        bucket: the bucket, or Azure's container.
        key: the rest, not percent-decoded, without slashes at its end.
    """

    scheme: str
    bucket: str
    key: str


def parse_object_url(path: str) -> ObjectUrl:
    """Parse a URL.

    Raises:
        CheckpointError: it is no such URL, names no bucket, or has a key with an empty part, '.' or '..'.
    """
    found = _URL.fullmatch(path)
    if found is None:
        hint = "write s3://bucket/key, gs://bucket/key or az://container/key"
        if _FLATTENED.match(path):
            hint = "pathlib.Path makes one slash of two: give the URL as a string"
        raise CheckpointError("this is not the URL of an object store", file=path, hint=hint)
    scheme, bucket, key = found[1], found[2], (found[3] or "").rstrip("/")
    if bucket.startswith("arn:"):
        raise CheckpointError("ARNs are not read", file=path, hint=_ARN_HINT)
    if not re.fullmatch(r"[A-Za-z0-9$][A-Za-z0-9._-]*", bucket):
        raise CheckpointError("this URL names no bucket", file=path, hint=f"write {scheme}://bucket/key")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise CheckpointError(
            "a key with an empty part, '.' or '..' cannot be read", file=path, hint="copy the object to a plain key"
        )
    return ObjectUrl(scheme, bucket, key)


def scheme_of(path: str) -> str:
    """The scheme of a URL, or of what names a store of another kind, S3's."""
    scheme = path.partition("://")[0]
    return scheme if scheme in SCHEMES else "s3"
