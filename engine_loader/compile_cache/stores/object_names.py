"""The names of everything that a store holds. What has another name belongs to somebody else: it is neither listed,
nor counted, nor deleted.
"""

from __future__ import annotations

import re
from typing import Literal

MARKER = "engine-loader-store.json"
DENIED = "denied.json"
INDEX = "index"
SUFFIX = ".tar.zst"
UNFINISHED = ".unfinished-"
USED = "used-"
PRUNED = "pruned-"
LEASE = "lease-"
SUSPECT = "suspect-"
SAVING = "saving"
"""The directory of notes of saves that are under way."""
QUARANTINED = "quarantined-"

Kind = Literal[
    "pack",
    "index",
    "used",
    "pruned",
    "lease",
    "suspect",
    "quarantined",
    "saving",
    "unfinished",
    "marker",
    "denied",
    "foreign",
]

_ENVIRONMENT = re.compile(r"[A-Za-z0-9.+_-]+_[0-9a-f]{12}")
_SCOPE = re.compile(r"[A-Za-z0-9_.+-]*[A-Za-z0-9_+][A-Za-z0-9_.+-]*")  # neither "." nor ".."
_IN_A_KEY: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("pack", re.compile(r"[0-9a-f]{64}\.tar\.zst")),
    ("index", re.compile(INDEX)),
    ("used", re.compile(USED + r"\d{4}-\d{2}-\d{2}")),
    ("lease", re.compile(LEASE + r"(save|compact)")),
    ("suspect", re.compile(SUSPECT + r"[0-9a-f]{64}")),
    ("quarantined", re.compile(QUARANTINED + r"[0-9a-f]{64}")),
    ("unfinished", re.compile(re.escape(UNFINISHED) + r"[0-9a-f]{32}")),
)
_IN_THE_ROOT: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("marker", re.compile(re.escape(MARKER))),
    ("denied", re.compile(re.escape(DENIED))),
    ("pruned", re.compile(PRUNED + r"\d{4}-\d{2}-\d{2}")),
    ("lease", re.compile(LEASE + "prune")),
    ("unfinished", re.compile(re.escape(UNFINISHED) + r"[0-9a-f]{32}")),
)
_SAVING: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("saving", re.compile(r"[0-9a-f]{32}")),
    ("unfinished", re.compile(re.escape(UNFINISHED) + r"[0-9a-f]{32}")),
)


def kind_of(name: str) -> Kind:
    """What an object is, by its name relative to the store's root."""
    parts = name.split("/")
    if len(parts) == 1:
        forms = _IN_THE_ROOT
    elif len(parts) == 2 and parts[0] == SAVING:
        forms = _SAVING
    elif len(parts) == 3 and is_environment(parts[0]) and is_scope(parts[1]):
        forms = _IN_A_KEY
    else:
        return "foreign"
    return next((kind for kind, form in forms if form.fullmatch(parts[-1])), "foreign")


def is_environment(name: str) -> bool:
    """Whether a directory's name is that of an environment, ``<env>_<12 hexadecimal digits>``."""
    return _ENVIRONMENT.fullmatch(name) is not None


def is_scope(name: str) -> bool:
    """Whether a directory's name may be that of a scope."""
    return _SCOPE.fullmatch(name) is not None


def is_key(prefix: str) -> bool:
    """Whether ``prefix`` has the form of a key's, ``<environment>/<scope>``."""
    environment, _, scope = prefix.partition("/")
    return is_environment(environment) and is_scope(scope)
