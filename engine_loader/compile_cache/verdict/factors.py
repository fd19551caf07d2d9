"""What an engine's keys are made of, as far as it may be stored and shown: without secrets.

Engines write environment variables there, and older ones all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...escaping import redacted

_SECRET_NAME = re.compile(
    "KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|BEARER|PRIVATE|WEBHOOK|DSN$|CONNECTION_STRING",
    re.IGNORECASE,
)


def without_secrets(value: Any) -> Any:
    """``value`` without entries whose names suggest a secret, and with secrets inside of texts replaced by ``***``.

    Numbers stay, whatever they are called: num_key_value_heads is no secret.

    Args:
        value: what JSON can hold; mappings and lists are looked into.
    """
    if isinstance(value, Mapping):
        return {
            redacted(str(name)): without_secrets(item) for name, item in value.items() if not _is_secret(name, item)
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def _is_secret(name: object, value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float)):
        return False
    return _SECRET_NAME.search(str(name)) is not None
