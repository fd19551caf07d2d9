"""What can go wrong with a compile cache. No error here may stop an engine; each is logged."""

from __future__ import annotations

from ..errors import EngineLoaderError


class CacheError(EngineLoaderError):
    """A compile cache could not be restored, saved or looked at."""


class CacheValidationError(CacheError):
    """A pack, a store or a path is refused: damaged, forged, of another key, or writable by other users.

    Attributes:
        is_signed: what is refused is a pack that a key of this node has signed.
    """

    is_signed = False


class CacheOperationInterrupted(CacheError):
    """A restore or a save was ended before it was complete, and cleaned up after itself: no space, no time."""
