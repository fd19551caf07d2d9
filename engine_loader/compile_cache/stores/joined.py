"""Reads of neighbouring ranges joined into one request: what counts in an object store is the number of requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

JOINED_BYTES = 64 << 20
"""No request is larger than this, unless a single range is."""
_LARGEST_GAP = 64 << 10


class JoinedReads:
    """Serves ranges that were announced from requests that fetch several of them. May be used by several threads.

    Args:
        fetch: (offset, size) -> the bytes.
    """

    def __init__(self, fetch: Callable[[int, int], bytes]) -> None:
        self._fetch = fetch
        self._groups: dict[int, _Group] = {}

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Announce (offset, size) that will each be read once."""
        for group in _grouped(sorted(ranges)):
            self._groups.update(dict.fromkeys(group.waiting, group))

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a range, with those of its neighbours where they were announced."""
        group = self._groups.pop(offset, None)
        if group is None or offset + size > group.end:
            return self._fetch(offset, size)
        return group.take(offset, size, self._fetch)


class _Group:
    def __init__(self, offset: int, size: int) -> None:
        self.begin, self.end = offset, offset + size
        self.waiting = {offset}
        self._lock = threading.Lock()
        self._content = b""

    def add(self, offset: int, size: int) -> None:
        self.end = max(self.end, offset + size)
        self.waiting.add(offset)

    def take(self, offset: int, size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        with self._lock:  # the first fetches, the others wait for it
            if not self._content:
                self._content = fetch(self.begin, self.end - self.begin)
            content = self._content[offset - self.begin : offset - self.begin + size]
            self.waiting.discard(offset)
            if not self.waiting:
                self._content = b""
        return content


def _grouped(ranges: list[tuple[int, int]]) -> list[_Group]:
    groups: list[_Group] = []
    for offset, size in ranges:
        last = groups[-1] if groups else None
        if last and offset - last.end <= _LARGEST_GAP and offset + size - last.begin <= JOINED_BYTES:
            last.add(offset, size)
        else:
            groups.append(_Group(offset, size))
    return groups
