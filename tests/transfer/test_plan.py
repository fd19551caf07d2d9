"""Plans: what they move, and that none reaches beyond its files."""

import numpy as np
import pytest

from engine_loader.errors import CheckpointError
from engine_loader.transfer.plan import EXTENT, check_plan, extent, make_extents, plan_bytes
from tests.support.sources import FakeFile

FILES = [FakeFile(bytes(100), "/a"), FakeFile(b"", "/empty")]


def test_a_row_of_a_plan_has_the_layout_of_the_native_readers():
    assert EXTENT.itemsize == 48
    assert [EXTENT.fields[name][1] for name in EXTENT.names] == [0, 4, 8, 16, 24, 32, 40]


def test_a_plan_knows_how_much_it_moves():
    assert plan_bytes(make_extents([])) == 0
    assert plan_bytes(make_extents([extent(0, 5, 10, 0), (0, 3, 0, 7, 20, 0, 7), extent(0, 0, 0, 0)])) == 31
    assert plan_bytes(make_extents([(0, 2**32 - 1, 0, 2**20, 0, 0, 0)])) == (2**32 - 1) * 2**20


@pytest.mark.parametrize(
    "row",
    [
        extent(0, 0, 100, 0),
        extent(0, 100, 0, 0),
        extent(1, 0, 0, 0),
        extent(0, 99, 1, 0),
        (0, 10, 0, 10, 10, 0, 10),
        (0, 3, 10, 30, 30, 0, 30),
        (0, 1000, 0, 100, 0, 0, 100),
        (0, 1, 0, 100, 2**63, 0, 2**63),
        (0, 0, 50, 50, 2**63, 0, 0),
    ],
)
def test_a_plan_within_its_files_is_carried_out(row):
    check_plan(make_extents([row]), FILES)


@pytest.mark.parametrize(
    "row",
    [
        extent(0, 0, 101, 0),
        extent(0, 100, 1, 0),
        extent(1, 0, 1, 0),
        extent(0, 2**64 - 1, 1, 0),
        extent(0, 2**64 - 1, 2, 0),
        extent(0, 50, 2**64 - 1, 0),
        (0, 11, 0, 10, 10, 0, 10),
        (0, 2, 0, 10, 2**64 - 5, 0, 10),
        (0, 2**32 - 1, 0, 1, 2**33, 0, 1),
        (0, 3, 0, 1, 2**63, 0, 1),
    ],
)
def test_a_plan_beyond_its_files_is_refused_whatever_overflows(row):
    with pytest.raises(CheckpointError, match="ends beyond the file's") as caught:
        check_plan(make_extents([extent(0, 0, 5, 0), row]), FILES)
    assert caught.value.file == FILES[row[0]].path
    assert caught.value.offset == row[2]


def test_checking_changes_nothing():
    plan = make_extents([extent(0, 0, 100, 0)])
    before = plan.copy()
    check_plan(plan, FILES)
    assert np.array_equal(plan, before)
