"""What can go wrong with a compile cache. None of it may stop an engine; all of it is told to a person."""

from __future__ import annotations

from ..errors import EngineLoaderError


class CacheError(EngineLoaderError):
    """A compile cache could not be restored, saved or looked at."""


class CacheValidationError(CacheError):
    """A pack, a store or a path is not what it should be: damaged, forged, of another key, or open to others."""


class CacheOperationInterrupted(CacheError):
    """A restore or a save was ended before it was complete, and cleaned up after itself: no space, no time."""
