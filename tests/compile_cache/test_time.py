"""Machines of a fleet disagree about the time; ages and order in a store do not depend on them."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs import pack as pack_module
from engine_loader.compile_cache.retention import Policy, prune
from tests.compile_cache.support import KEY, SECRET, Machine

POLICY = Policy(days=30, keys=100, bytes=1 << 40, unfinished_s=3600)
DAY_S = 86400.0
MINUTES_S = {"31 days ahead": 31 * DAY_S, "10 minutes ahead": 600.0, "a year behind": -365 * DAY_S}


@contextmanager
def clock_off(by_s: float) -> Iterator[None]:
    """This machine's clock is wrong; that of the file system is right."""
    right = time.time
    time.time = lambda: right() + by_s  # type: ignore[assignment]
    try:
        yield
    finally:
        time.time = right


@pytest.fixture
def replaced(first: Machine) -> Machine:
    """A key with two packs that a compaction has just replaced, and another key."""
    first.save()
    first.write("inductor/more", b"more")
    first.save()
    assert compact(first.store, KEY, SECRET, level=1) is not None
    first.save(CacheKey((("torch", "2.13.0"),), "other"))
    return Machine(first.directories["inductor"].parent, first.store.directory)


@pytest.mark.parametrize("by", MINUTES_S)
def test_a_wrong_clock_prunes_nothing_and_says_so(by: str, replaced: Machine) -> None:
    packs = replaced.store.list()
    with clock_off(MINUTES_S[by]):
        done = prune(replaced.store, POLICY, SECRET)
    assert done.deleted == []
    assert "clock" in done.messages[0]
    assert replaced.store.list() == packs


def test_a_clock_that_is_a_little_off_prunes_by_the_stores_time(replaced: Machine) -> None:
    """290 s ahead: what is 400 s old is not yet 600 s old."""
    for pack in replaced.packs():
        os.utime(pack, (time.time() - 400,) * 2)
    with clock_off(290):
        assert prune(replaced.store, POLICY, SECRET).deleted == []
    for pack in replaced.packs():
        os.utime(pack, (time.time() - 700,) * 2)
    with clock_off(-290):
        assert len(prune(replaced.store, POLICY, SECRET).deleted) == 2


@pytest.mark.parametrize("by", MINUTES_S)
def test_what_is_saved_later_wins_whatever_the_clock_says(by: str, first: Machine, second: Machine) -> None:
    with clock_off(MINUTES_S[by]):
        first.save()
    first.write("inductor/ab/kernel.so", b"newer")
    Machine(first.directories["inductor"].parent, first.store.directory).save()
    second.restore()
    assert second.content()["inductor/ab/kernel.so"] == b"newer"
    assert second.save().status == "complete"


def test_a_pack_made_in_2034_is_refused_and_wins_over_nothing(
    first: Machine, second: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version wrote it, that took a machine's clock."""
    old = Machine(tmp_path / "old", first.store.directory)
    old.write("inductor/ab/kernel.so", b"from the future")
    monkeypatch.setattr(old.store, "now", lambda: 2_030_000_000.0)
    old.save()
    assert first.save().status == "saved"
    outcome = second.restore()
    assert outcome.status == "restored"
    assert second.content() == first.content()
    assert "made in the future" in outcome.messages[0]
    assert first.save().status == "complete"
    assert second.save().status == "complete"


def test_equal_content_is_saved_again_where_the_pack_of_its_name_is_refused(
    first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first.store, "now", lambda: 2_030_000_000.0)
    first.save()
    monkeypatch.undo()
    again = Machine(first.directories["inductor"].parent, first.store.directory)
    assert again.save().status == "saved"
    assert len(again.packs()) == 2
    assert second.restore().status == "restored"
    assert again.save().status == "complete"


def test_a_pack_up_to_a_day_ahead_is_taken(first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = first.store.now()
    monkeypatch.setattr(first.store, "now", lambda: real + pack_module.MOST_AHEAD_S - 100)
    first.save()
    assert second.restore().status == "restored"


def test_the_order_of_saves_is_that_of_what_they_saw(
    first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first.save()
    second.restore()
    second.write("inductor/ab/kernel.so", b"a year behind, and later")
    monkeypatch.setattr(second.store, "now", lambda: time.time() - 365 * DAY_S)
    assert second.save().status == "saved"
    third = Machine(first.directories["inductor"].parent / "third", first.store.directory)
    third.restore()
    assert third.content()["inductor/ab/kernel.so"] == b"a year behind, and later"
