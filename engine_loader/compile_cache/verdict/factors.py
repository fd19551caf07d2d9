"""What an engine's keys are made of, as far as it may be stored and shown: without secrets.

Engines write environment variables there, and older ones all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET_NAME = re.compile(
    "KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|BEARER|PRIVATE|WEBHOOK|DSN$|CONNECTION_STRING",
    re.IGNORECASE,
)
_LEFT_OUT = "***"
# Values that are secrets whatever their names: of OpenAI and others, Hugging Face, GitHub, GitLab, Slack, AWS, Google,
# JSON web tokens, private keys, headers, and user:password in URLs.
_SECRET_VALUE = re.compile(
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abeoprs]-[\w-]{10,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}"
    r"|\bnvapi-[\w-]{16,}|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?|-----BEGIN [A-Z ]*PRIVATE KEY-----.*"
    r"|\b(?:Bearer|Basic)\s+[\w.+/=-]{8,}|(?<=://)[^/@\s]*@",
    re.IGNORECASE | re.DOTALL,
)


def without_secrets(value: Any) -> Any:
    """``value`` without entries whose names suggest a secret, and with secrets inside of texts replaced by ``***``.

    Numbers stay, whatever they are called: num_key_value_heads is no secret.

    Args:
        value: what JSON can hold; mappings and lists are looked into.
    """
    if isinstance(value, Mapping):
        return {
            _redacted(str(name)): without_secrets(item) for name, item in value.items() if not _is_secret(name, item)
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return _redacted(value) if isinstance(value, str) else value


def _is_secret(name: object, value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float)):
        return False
    return _SECRET_NAME.search(str(name)) is not None


def _redacted(text: str) -> str:
    return _SECRET_VALUE.sub(_LEFT_OUT, text)
