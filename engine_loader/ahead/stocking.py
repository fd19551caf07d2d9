"""Weights are read into memory while an engine imports, by a process of its own (``keeper``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..settings import LoaderSettings
from ..start.page_reading import Ranges
from ..start.page_warmer import order
from ..start.warming import WarmingAccount, answers_of


def stock_files(
    paths: Sequence[str],
    ranges: Mapping[str, Ranges],
    settings: LoaderSettings,
    most_bytes: int,
    tell: Callable[[WarmingAccount], object],
) -> None:
    """Have the files read into memory, in their order, by a process that keeps them for the loaders; returns when that
    has ended.

    Args:
        paths: of one directory, or below one URL, in the order in which they will be read.
        ranges: path -> what of it will be read; of files that are not in it, all.
        settings: how they are read.
        most_bytes: of memory.
        tell: called once, when no more is read.
    """
    told = False
    try:
        asked = order(paths, ranges, settings=settings.model_dump(mode="json"), most_bytes=most_bytes)
        for said in answers_of("engine_loader.ahead.keeper", asked, "-P"):
            told = True
            tell(WarmingAccount.of(said))
    except (OSError, ValueError, TypeError) as error:
        if not told:
            tell(WarmingAccount(reason=f"the process for it failed ({error})"))
