"""The progress bar of a load."""

from __future__ import annotations

from typing import Protocol

from tqdm import tqdm

# vLLM's format: one line per update, so that a container's log stays readable.
_BAR_FORMAT = "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n"
_SECONDS_BETWEEN_LINES = 1.0


class Progress(Protocol):
    """Counts bytes that have been loaded."""

    def update(self, nbytes: float, /) -> object:
        """Add ``nbytes`` to the bytes that are done."""
        ...

    def close(self) -> object:
        """End the progress."""
        ...


class CountedProgress:
    """A progress whose bytes can be asked for while it goes on.

    Args:
        progress: is updated and closed with it.
        total_bytes: that are expected.
    """

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress = progress
        self._total = total_bytes
        self._done = 0

    def update(self, nbytes: float, /) -> None:
        """Add ``nbytes`` to the bytes that are done."""
        self._done += int(nbytes)
        self._progress.update(nbytes)

    def close(self) -> None:
        """End the progress."""
        self._progress.close()

    def counts(self) -> tuple[int, int]:
        """Bytes that are done, and bytes in all."""
        return self._done, self._total


def byte_progress(total_bytes: int, description: str, *, shown: bool) -> CountedProgress:
    """A progress bar of ``total_bytes`` bytes; it prints nothing if ``shown`` is False."""
    bar = tqdm(
        total=total_bytes,
        desc=description,
        disable=not shown,
        bar_format=_BAR_FORMAT,
        mininterval=_SECONDS_BETWEEN_LINES,
        unit="B",
        unit_scale=True,
    )
    return CountedProgress(bar, total_bytes)
