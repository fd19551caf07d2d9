"""A plan whose bytes partly lie in a stock (sources/stock.py): those extents are read from its memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..sources.source import SourceFile
from ..sources.stock import StockedFile
from .plan import Extents, plan_bytes


def from_stock(files: Sequence[SourceFile], extents: Extents) -> tuple[Sequence[SourceFile], Extents, int]:
    """The files and the extents, with those extents read from a stock that lie in it as a whole.

    Args:
        files: what the plan's ``file`` numbers refer to.
        extents: a plan that does not reach beyond its files.

    Returns:
        Both, and how many bytes will come from the stock.
    """
    if not len(extents) or not any(isinstance(file, StockedFile) for file in files):
        return files, extents, 0
    last_row = np.where(extents["rows"] > 1, extents["rows"] - np.uint32(1), 0).astype(np.uint64)
    ends = extents["offset"] + last_row * extents["src_stride"] + extents["row_bytes"]
    found, plan = list(files), extents.copy()
    memories: dict[SourceFile, int] = {}
    nbytes = 0
    for number, file in enumerate(files):
        stock = file.stock if isinstance(file, StockedFile) else None
        if stock is None or not isinstance(file, StockedFile):
            continue
        of_file = extents["file"] == number
        for part in file.parts:
            there = of_file & (extents["offset"] >= np.uint64(part.begin)) & (ends <= np.uint64(part.end))
            if not there.any():
                continue
            place = memories.setdefault(stock.memory, len(found))
            if place == len(found):
                found.append(stock.memory)
            plan["file"][there] = place
            plan["offset"][there] = extents["offset"][there] - np.uint64(part.begin) + np.uint64(part.position)
            nbytes += plan_bytes(extents[there])
    return found, plan, nbytes
