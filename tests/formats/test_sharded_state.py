"""The names of a sharded_state checkpoint's files."""

import pytest

from engine_loader import CheckpointError
from engine_loader.formats.sharded_state import ShardRank, check_pattern, shards_by_rank, shards_of


def test_vllms_patterns_are_known_and_parts_are_in_order() -> None:
    names = [f"model-rank-{rank}-part-{part}.safetensors" for part in (10, 9, 0) for rank in (1, 0)]
    found = shards_by_rank([*names, "config.json", "model.safetensors"])
    assert list(found) == [ShardRank(0, 0), ShardRank(0, 1)]
    assert found[ShardRank(0, 1)] == [f"model-rank-1-part-{part}.safetensors" for part in (0, 9, 10)]
    found = shards_by_rank(["model-pp-1-tp-3-part-0.safetensors", "model-pp-0-tp-3-part-0.safetensors"])
    assert list(found) == [ShardRank(0, 3), ShardRank(1, 3)]


def test_an_ordinary_checkpoint_is_none() -> None:
    names = ["model-00001-of-00002.safetensors", "model.safetensors", "model-rank-x-part-0.safetensors"]
    assert shards_by_rank(names) == {}


def test_a_pattern_of_ones_own_is_matched_as_it_stands() -> None:
    pattern = "{{x}}.{tp_rank}+{part}+{tp_rank}.st"
    names = ["{x}.3+0+3.st", "{x}.3+0+4.st", "{x}.31+0+3.st", "{x}.2+1+2.st"]
    assert shards_by_rank(names, pattern) == {ShardRank(0, 2): ["{x}.2+1+2.st"], ShardRank(0, 3): ["{x}.3+0+3.st"]}


@pytest.mark.parametrize("pattern", ["{node}-{part}", "model-{rank}.safetensors", "a/{rank}-{part}"])
def test_a_pattern_that_cannot_serve_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"unknown fields|\{part\}|without a directory"):
        check_pattern(pattern)


def test_a_rank_that_is_not_there_is_an_error() -> None:
    shards = shards_by_rank(["model-rank-0-part-0.safetensors"])
    with pytest.raises(CheckpointError, match=r"files of 1 ranks, and rank 1 of 2"):
        shards_of(shards, ShardRank(0, 1), 2, "dir")
    with pytest.raises(CheckpointError, match=r"files of 1 ranks"):
        shards_of(shards, ShardRank(0, 0), 2, "dir")
    with pytest.raises(CheckpointError, match=r"files of 1 ranks, but none of pipeline stage 1, rank 0"):
        shards_of(shards, ShardRank(1, 0), None, "dir")
    assert shards_of(shards, ShardRank(), None, "dir") == ["model-rank-0-part-0.safetensors"]
