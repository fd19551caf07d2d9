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


def byte_progress(total_bytes: int, description: str, *, shown: bool) -> Progress:
    """A progress bar of ``total_bytes`` bytes; it prints nothing if ``shown`` is False."""
    return tqdm(
        total=total_bytes,
        desc=description,
        disable=not shown,
        bar_format=_BAR_FORMAT,
        mininterval=_SECONDS_BETWEEN_LINES,
        unit="B",
        unit_scale=True,
    )
