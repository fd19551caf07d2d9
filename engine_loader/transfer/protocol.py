"""What reader threads are: the interface that the pure-Python and the native ones share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..sources.source import SourceFile
from .plan import Extents


@dataclass
class TransferStatistics:
    """What reader threads have done since they were made.

    Attributes:
        bytes_read: bytes that reached their destinations.
        overread_bytes: bytes that were read beside them and thrown away: gaps between wanted ones, alignment.
        reads: read calls (IOs) that were made.
        retries: reads that were tried again after an error that may pass.
        first_retry: the file of the first one, and its error; "" where there was none.
        slowest_file: the file whose reads took much longer for their bytes than those of others; "" where none did.
        short_reads: reads that returned less than asked and were resumed.
        bytes_ahead: bytes that were taken from a stock (sources/stock.py), not from their file.
        read_seconds: time spent in reads, summed over the threads.
        modes: ways of reading that were used, with the bytes of each ("buffered", "direct", "memory", …).
    """

    bytes_read: int = 0
    overread_bytes: int = 0
    reads: int = 0
    retries: int = 0
    first_retry: str = ""
    slowest_file: str = ""
    short_reads: int = 0
    bytes_ahead: int = 0
    read_seconds: float = 0.0
    modes: dict[str, int] = field(default_factory=dict)


class Transfer(Protocol):
    """One submitted plan, in flight or done.

    The destinations must stay alive until the transfer is complete, failed or cancelled: all three mean that nothing
    will be written any more.

    Attributes:
        nbytes: bytes that the plan moves.
    """

    nbytes: int

    def wait(self, extent: int | None = None, timeout_s: float | None = None) -> bool:
        """Wait until extent number ``extent`` (or all of the plan) is complete; False when ``timeout_s`` ran out first.

        Ctrl-C is noticed within a fifth of a second.

        Raises:
            TransferError: the transfer failed, with file, offset, cause and what to do; or it was cancelled.
        """
        ...

    @property
    def bytes_done(self) -> int:
        """Bytes that have arrived, for a progress bar."""
        ...

    def cancel(self) -> None:
        """Give up what has not been read; returns when nothing will be written to the destinations any more."""
        ...


def wait_or_cancel(transfer: Transfer) -> None:
    """Wait for all of a transfer; when that fails, nothing will be written to the destinations any more.

    Raises:
        TransferError: as ``Transfer.wait``.
    """
    try:
        transfer.wait()
    except BaseException:
        transfer.cancel()
        raise


class ReaderThreads(Protocol):
    """Moves bytes from files into memory on threads of its own.

    Attributes:
        name: "cpp" or "python", as in the log line.
        threads: how many threads read.
    """

    name: str
    threads: int

    def submit(
        self, files: Sequence[SourceFile], extents: Extents, *, ordered: bool = True, owner: object = None
    ) -> Transfer:
        """Start a plan; transfers are served first come, first served.

        Neighbouring extents are merged and large ones are cut, so neither many small nor few large ones are slow.

        Args:
            files: what the plan's ``file`` numbers refer to. They stay open until the transfer is done.
            extents: the plan (see plan.py). Destinations must not overlap.
            ordered: read in the order of files and offsets, so that early extents are complete early; False lets the
                readers choose (largest blocks first).
            owner: whatever keeps the destinations alive; held until nothing can be written to them any more, which
                after a read that never returns is for ever.

        Raises:
            CheckpointError: an extent reaches beyond its file.
        """
        ...

    def statistics(self) -> TransferStatistics:
        """What was done so far."""
        ...

    def close(self) -> None:
        """Cancel what is in flight and end the threads. Safe to call twice."""
        ...
