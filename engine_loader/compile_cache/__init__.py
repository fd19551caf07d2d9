"""Compile caches that a whole fleet shares: restored before an engine's warm-up, saved after it.

A *key* says for which environment a cache holds. Under a key lie immutable *packs*; a restore reads all of them, a
save adds one with what the store does not have yet. So saves need no lock, and no pack is visible before it is
complete. Caches are code: read docs/security.md.
"""
