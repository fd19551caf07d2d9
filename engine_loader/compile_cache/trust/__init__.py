"""Whose packs are taken. Caches are code: the writer of a pack runs code in every engine that restores it.

With keys, a pack counts when its signature is right, wherever it lies. Without, it counts when only this user and root
could have written it. docs/security.md states the model; to add a kind of key, see ``signatures``.
"""

from .places import check_above, check_private, make_private
from .policy import CANNOT_SIGN, Trust, load_trust

__all__ = ["CANNOT_SIGN", "Trust", "check_above", "check_private", "load_trust", "make_private"]
