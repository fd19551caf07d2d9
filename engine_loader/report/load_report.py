"""What is counted during one load, and the line that goes to the log."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..formats.safetensors import TensorInfo


@dataclass
class LoadReport:
    """Counts while a load runs.

    Attributes:
        source: where the bytes came from, e.g. "posix".
        engine: what read them, e.g. "python engine, 2 threads".
        files: how many files were read from.
        tensors: how many tensors were handed out or filled.
        bytes_offered: bytes of those tensors.
        bytes_kept: direct mode: of these, those that were read because this rank keeps them; None in other modes.
        bytes_read: bytes that were read from the source, with those thrown away (gaps, alignment); filled at the end.
        bytes_ahead: of these, bytes that lay in memory, since a process had read them ahead; filled at the end.
        read_seconds: time spent in reads, summed over the reader threads; filled at the end.
        waited: seconds for which the engine's thread waited, by what it waited for.
        waits_for: what the load is at just now: "source", where the engine's thread waits for bytes, or "engine", where
            that works on tensors.
        retries: reads that failed and were tried again; filled at the end.
        first_retry: the file and the error of the first one; filled at the end.
        slowest_file: the file whose reads took much longer than those of others, and how much; filled at the end.
        peak_buffer_bytes: the most bytes that buffers took at once.
        modes: ways of reading with the bytes of each; filled at the end.
        notes: remarks for the line, e.g. why a mode was not used.
    """

    source: str = ""
    engine: str = ""
    tensors: int = 0
    bytes_offered: int = 0
    bytes_kept: int | None = None
    bytes_read: int = 0
    bytes_ahead: int = 0
    read_seconds: float = 0.0
    waited: dict[str, float] = field(default_factory=dict)
    waits_for: Literal["source", "engine"] = "engine"
    retries: int = 0
    first_retry: str = ""
    slowest_file: str = ""
    peak_buffer_bytes: int = 0
    modes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _files: set[str] = field(default_factory=set)
    _began: float = field(default_factory=time.perf_counter)
    _seconds: float | None = None

    @property
    def files(self) -> int:
        return len(self._files)

    @property
    def seconds(self) -> float:
        """From the start to ``stop_clock``, or to now."""
        return time.perf_counter() - self._began if self._seconds is None else self._seconds

    def count_tensor(self, info: TensorInfo) -> None:
        """Count a tensor that was handed out or filled, and its file."""
        self.tensors += 1
        self.bytes_offered += info.nbytes
        self._files.add(info.file)

    def count_files(self, files: Iterable[str]) -> None:
        """Count files that were read from, where a tensor may lie in several."""
        self._files.update(files)

    def count_bytes_kept(self, nbytes: int) -> None:
        """Count bytes that were read because this rank keeps them (direct mode only)."""
        self.bytes_kept = (self.bytes_kept or 0) + nbytes

    @property
    def bytes_loaded(self) -> int:
        """Bytes that were loaded: in direct mode what this rank keeps, else all that was handed out."""
        return self.bytes_offered if self.bytes_kept is None else self.bytes_kept

    def note_peak_buffer(self, peak_bytes: int) -> None:
        """Note the most bytes that a pool of buffers took; the largest of all calls stays."""
        self.peak_buffer_bytes = max(self.peak_buffer_bytes, peak_bytes)

    def count_bytes_mapped(self, nbytes: int) -> None:
        """Count bytes that were handed out as mapped pages."""
        self.modes["mapped"] = self.modes.get("mapped", 0) + nbytes

    def count_bytes_by_gds(self, nbytes: int) -> None:
        """Count bytes that went to a device by GPUDirect Storage."""
        self.modes["gds"] = self.modes.get("gds", 0) + nbytes

    def add_wait(self, cause: str, seconds: float) -> None:
        """Count seconds for which the engine's thread waited."""
        self.waited[cause] = self.waited.get(cause, 0.0) + seconds

    def to_details(self) -> dict[str, Any]:
        """The counts, for the events of a start."""
        return {
            "bytes": self.bytes_offered if self.bytes_kept is None else self.bytes_kept,
            "bytes_offered": self.bytes_offered,
            "bytes_read": self.bytes_read,
            "bytes_ahead": self.bytes_ahead,
            "tensors": self.tensors,
            "files": self.files,
            "seconds": round(self.seconds, 4),
            "read_seconds": round(self.read_seconds, 4),
            "waited": {cause: round(seconds, 4) for cause, seconds in self.waited.items()},
            "retries": self.retries,
            "source": self.source,
            "engine": self.engine,
            "modes": sorted(self.modes),
        }

    def add_note(self, text: str) -> None:
        """Add a remark to the end of the line."""
        self.notes.append(text)

    def stop_clock(self) -> None:
        """Stop the clock."""
        self._seconds = time.perf_counter() - self._began

    def line(self) -> str:
        """One line for the log: bytes, tensors, files, seconds, GB/s, source, engine, buffers."""
        rate = self.bytes_loaded / max(self.seconds, 1e-9) / 1e9
        ways = f", {'+'.join(sorted(self.modes))}" if self.modes else ""
        whole = f" of {human_bytes(self.bytes_offered)}" if self.bytes_loaded < self.bytes_offered else ""
        notes = "".join(f"; {note}" for note in self.notes)
        if self.bytes_ahead:
            notes = f"; {human_bytes(self.bytes_ahead)} of it were read ahead{notes}"
        if self.slowest_file:
            notes = f"; slowest file {self.slowest_file}{notes}"
        if self.first_retry:
            notes = f"; {_count(self.retries, 'read')} tried again, the first in {self.first_retry}{notes}"
        return (
            f"loaded {human_bytes(self.bytes_loaded)}{whole} ({self.tensors} tensors, {_count(self.files, 'file')}) "
            f"in {self.seconds:.2f} s, {rate:.2f} GB/s, from {self.source} ({self.engine}{ways}), "
            f"peak buffers {human_bytes(self.peak_buffer_bytes)}{notes}"
        )


def human_bytes(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(nbytes) < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}" if nbytes < 10 else f"{nbytes:.1f} {unit}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
