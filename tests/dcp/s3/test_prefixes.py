"""What each rank's objects are called: by every strategy, as s3torchconnector calls them."""

import pytest
import s3torchconnector.dcp as theirs
from s3torchconnector.dcp.s3_prefix_strategy import RoundRobinPrefixStrategy as TheirRoundRobin

from engine_loader import dcp
from engine_loader.dcp import (
    BinaryPrefixStrategy,
    DefaultPrefixStrategy,
    HexPrefixStrategy,
    NumericPrefixStrategy,
    RoundRobinPrefixStrategy,
)


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        (DefaultPrefixStrategy(), {0: "__0_", 7: "__7_"}),
        (
            BinaryPrefixStrategy(prefix_count=4),
            {0: "0000000000/__0_", 1: "1000000000/__1_", 2: "0100000000/__2_", 3: "1100000000/__3_"},
        ),
        (BinaryPrefixStrategy(prefix_count=4), {4: "0000000000/__4_", 6: "0100000000/__6_"}),
        (BinaryPrefixStrategy(), {0: "0000000000/__0_", 1: "0000000000/__1_"}),
        (BinaryPrefixStrategy(3, 2, 4), {1: "10/epoch_3/__1_"}),
        (BinaryPrefixStrategy(min_prefix_length=1, prefix_count=5), {4: "001/__4_"}),
        (
            HexPrefixStrategy(epoch_num=5, min_prefix_length=1, prefix_count=300),
            {1: "100/epoch_5/__1_", 299: "b21/epoch_5/__299_", 300: "000/epoch_5/__300_"},
        ),
        (HexPrefixStrategy(epoch_num=0, prefix_count=16), {10: "a000000000/epoch_0/__10_"}),
        (HexPrefixStrategy(min_prefix_length=1, prefix_count=16), {15: "f/__15_"}),
        (NumericPrefixStrategy(10, min_prefix_length=3, prefix_count=20), {12: "210/__12_"}),
        (RoundRobinPrefixStrategy(["a", "b/c"]), {0: "a/__0_", 1: "b/c/__1_", 2: "a/__2_"}),
        (RoundRobinPrefixStrategy(["a"], epoch_num=4), {3: "a/epoch_4/__3_"}),
    ],
)
def test_names(strategy: dcp.S3PrefixStrategyBase, names: dict[int, str]) -> None:
    assert {rank: strategy(rank) for rank in names} == names
    assert {rank: strategy.generate_prefix(rank) for rank in names} == names


@pytest.mark.parametrize("kind", ["BinaryPrefixStrategy", "HexPrefixStrategy"])
@pytest.mark.parametrize("epoch", [None, 0, 12])
@pytest.mark.parametrize("length", [1, 3, 10])
@pytest.mark.parametrize("count", [None, 1, 2, 15, 16, 17, 256, 257])
def test_names_are_those_of_s3torchconnector(kind: str, epoch: int | None, length: int, count: int | None) -> None:
    arguments = {"epoch_num": epoch, "min_prefix_length": length, "prefix_count": count}
    ours, other = getattr(dcp, kind)(**arguments), getattr(theirs, kind)(**arguments)
    assert [ours(rank) for rank in range(300)] == [other(rank) for rank in range(300)]
    for name in ("base", "epoch_num", "min_prefix_len", "prefix_count", "prefix_map"):
        assert getattr(ours, name) == getattr(other, name)


def test_round_robin_is_that_of_s3torchconnector() -> None:
    ours, other = RoundRobinPrefixStrategy(["x", "y", "z"], 2), TheirRoundRobin(["x", "y", "z"], 2)
    assert [ours(rank) for rank in range(10)] == [other(rank) for rank in range(10)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"min_prefix_length": 0}, "min_prefix_length is 0"),
        ({"min_prefix_length": -1}, "min_prefix_length is -1"),
        ({"min_prefix_length": 2.0}, "min_prefix_length is 2.0"),
        ({"epoch_num": "5"}, "epoch_num is '5'"),
        ({"epoch_num": 1.0}, "epoch_num is 1.0"),
        ({"epoch_num": True}, "epoch_num is True"),
        ({"prefix_count": 0}, "prefix_count is 0"),
        ({"prefix_count": -2}, "prefix_count is -2"),
        ({"prefix_count": 1.5}, "prefix_count is 1.5"),
        ({"prefix_count": True}, "prefix_count is True"),
    ],
)
@pytest.mark.parametrize("kind", [BinaryPrefixStrategy, HexPrefixStrategy])
def test_arguments_that_make_no_sense_are_refused(kind: type, arguments: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kind(**arguments)


def test_other_arguments_that_make_no_sense_are_refused() -> None:
    for prefixes in ([], "ab", [1]):
        with pytest.raises(ValueError, match="user_prefixes is"):
            RoundRobinPrefixStrategy(prefixes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch_num is False"):
        RoundRobinPrefixStrategy(["a"], epoch_num=False)
    for base in (1, 17, True):
        with pytest.raises(ValueError, match="base is"):
            NumericPrefixStrategy(base)


def test_a_prefix_tells_whose_it_may_be() -> None:
    small, large = BinaryPrefixStrategy(5, 3, 2), BinaryPrefixStrategy(5, 3, 16)
    assert all(small.is_of(rank, large(rank)) and large.is_of(rank, small(rank)) for rank in range(40))
    for prefix in ("1100/epoch_5/__2_", "0100/epoch_4/__2_", "01/epoch_5/__2_", "0200/epoch_5/__2_", "/epoch_5/__2_"):
        assert not small.is_of(2, prefix)
    assert not small.is_of(3, small(2))
    rounds = RoundRobinPrefixStrategy(["x", "y"])
    assert rounds.is_of(3, "y/__3_")
    assert not rounds.is_of(3, "x/__3_")
