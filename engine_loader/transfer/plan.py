"""A plan: which bytes of which files go where in memory.

An extent is two-dimensional, so that a slice of an inner dimension is one row of the plan: ``rows`` runs of
``row_bytes`` bytes, ``src_stride`` bytes apart in the file from ``offset`` on, put ``dst_stride`` bytes apart in memory
from ``address`` on. A plain contiguous extent has one row (its strides are ignored).

The columns are a numpy structured array whose layout is the native library's ``el_extent``, so that submitting copies
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..sources.source import SourceFile

EXTENT = np.dtype(
    [
        ("file", "<u4"),
        ("rows", "<u4"),
        ("offset", "<u8"),
        ("row_bytes", "<u8"),
        ("src_stride", "<u8"),
        ("address", "<u8"),
        ("dst_stride", "<u8"),
    ]
)
"""One extent, 48 bytes, native alignment; the same as ``el_extent`` in transfer/native/src/core/c_interface.h."""

Extents = npt.NDArray[np.void]


class ExtentRow(NamedTuple):
    """One extent, in the order of the columns of ``EXTENT``.

    Attributes:
        file: number of the file in the plan.
        rows: runs of bytes.
        offset: of the first run in the file, in bytes.
        row_bytes: of each run.
        src_stride: bytes from one run to the next in the file; ignored where there is one row.
        address: of the first run's destination.
        dst_stride: bytes from one run to the next in memory; ignored where there is one row.
    """

    file: int
    rows: int
    offset: int
    row_bytes: int
    src_stride: int
    address: int
    dst_stride: int


_new_row = (
    tuple.__new__
)  # by way of ExtentRow(...), a row takes two to three times as long: 100,000 small tensors show it


def extent(file: int, offset: int, nbytes: int, address: int) -> ExtentRow:
    """A contiguous extent: ``nbytes`` at ``offset`` of file number ``file`` to memory ``address``."""
    return _new_row(ExtentRow, (file, 1, offset, nbytes, 0, address, 0))


def make_extents(rows: Sequence[ExtentRow | tuple[int, int, int, int, int, int, int]]) -> Extents:
    """The plan of the given extents, in the given order; extents without bytes are kept (they are complete at once)."""
    return np.array(rows, dtype=EXTENT)


def plan_bytes(extents: Extents) -> int:
    """How many bytes the plan moves."""
    if len(extents) == 0:
        return 0
    return int((extents["rows"].astype(np.uint64) * extents["row_bytes"]).sum())


def files_of_plan(files: Sequence[SourceFile], extents: Extents) -> tuple[Sequence[SourceFile], Extents]:
    """The files that the extents are of, and the extents with numbers of those.

    A checkpoint has up to a thousand open files, and a plan in direct mode reads one or two: what a plan costs must not
    depend on the others.
    """
    if len(files) <= 1 or len(extents) == 0:
        return files, extents
    numbers = extents["file"]
    used = np.flatnonzero(np.bincount(numbers, minlength=len(files)))
    if len(used) >= len(files) or used[-1] >= len(files):  # of a file that is not there: check_plan says so
        return files, extents
    extents = extents.copy()
    extents["file"] = np.searchsorted(used, numbers)
    return [files[number] for number in used], extents


def check_plan(extents: Extents, files: Sequence[SourceFile]) -> None:
    """Refuse a plan that reaches beyond its files: reader threads must never be asked for bytes that cannot be there.

    Raises:
        CheckpointError: an extent ends after its file.
    """
    if len(extents) == 0:
        return
    sizes = np.array([file.size for file in files], dtype=np.uint64)[extents["file"]]
    # In differences and quotients, because sums and products can overflow. Where one would be negative, there is a
    # comparison before it that says so.
    after_row = sizes - extents["row_bytes"]
    is_beyond = (extents["row_bytes"] > sizes) | (extents["offset"] > after_row)
    several = extents["rows"] > 1
    if several.any():
        more_rows = np.where(several, extents["rows"], 2).astype(np.uint64) - np.uint64(1)
        is_beyond |= several & (extents["src_stride"] > (after_row - extents["offset"]) // more_rows)
    beyond = np.flatnonzero(is_beyond)
    if len(beyond):
        bad = extents[beyond[0]]
        file = files[int(bad["file"])]
        raise CheckpointError(
            f"the read of {int(bad['row_bytes'])} bytes ends beyond the file's {file.size} bytes",
            file=file.path,
            offset=int(bad["offset"]),
        )
