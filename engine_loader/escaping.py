"""Text from outside (names of files, values in packs, a server's answers) as it may stand in a log or a terminal."""

from __future__ import annotations

import re
from functools import cache

_LEFT_OUT = "***"
# Of OpenAI and others, Hugging Face, GitHub, GitLab, Slack, AWS, Google, NVIDIA; JSON web tokens, private keys,
# headers, user:password in URLs, and the parameters that sign a URL.
_SECRET = (
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abeoprs]-[\w-]{10,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}"
    r"|\bnvapi-[\w-]{16,}|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?|-----BEGIN [A-Z ]*PRIVATE KEY-----.*"
    r"|\b(?:Bearer|Basic)\s+[\w.+/=-]{8,}|(?<=://)[^/\s]*(?=@)"
    r"|(?<=[?&])(?:X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|sig)=[^&\s\"')]+"
)


def redacted(text: str) -> str:
    """``text`` with what looks like a password, a token or a key replaced by ``***``, whatever it is called."""
    return _secret().sub(_LEFT_OUT, text)


# Compiled with its first use: this takes as long as all else that an engine imports of this package to register it.
@cache
def _secret() -> re.Pattern[str]:
    return re.compile(_SECRET, re.IGNORECASE | re.DOTALL)


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with line breaks, escape sequences and all else that is not printable escaped.

    Whoever chooses a name could otherwise write lines of their own into a log, or control a terminal.

    Args:
        text: what is to be shown.
        lines: True leaves line feeds as they are.
    """
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )
