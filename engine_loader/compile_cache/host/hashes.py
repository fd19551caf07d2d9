"""Short hashes, for names that people read."""

from __future__ import annotations

import hashlib


def short_hash(*texts: str) -> str:
    """Eight hexadecimal digits."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:8]
