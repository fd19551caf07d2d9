"""Parsers take any bytes: they answer, or refuse with an error of ours, within limits on memory and CPU time."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.errors import CheckpointError
from tests.support.children import ChildDied

from .corpora import targets
from .limits import within_limits
from .mutations import mutated

TARGETS = targets()
INPUTS = 150


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read(name):
    for content in TARGETS[name].seeds:
        TARGETS[name].parse(content)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds_are_read_or_refused_within_limits(name):
    target = TARGETS[name]
    for content in target.seeds:
        target.parse(content)
    chance = random.Random(name)
    inputs = [mutated(target.seeds, chance) for _ in range(INPUTS)]

    def parse_all() -> None:
        for content in inputs:
            try:
                target.parse(content)
            except (CheckpointError, CacheValidationError):
                pass
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}: {content[:400]!r}") from error

    assert within_limits(parse_all) == ""


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=200), at=st.integers(0, 200), keep=st.booleans())
def test_any_bytes_are_read_or_refused(name, content, at, keep):
    seed = TARGETS[name].seeds[0]
    whole = seed[:at] + content + (seed[at:] if keep else b"")
    try:
        TARGETS[name].parse(whole)
    except (CheckpointError, CacheValidationError) as error:
        assert str(error).startswith("f")


def test_what_takes_too_much_is_found():
    with pytest.raises(ChildDied, match="MemoryError"):
        within_limits(lambda: bytearray(1 << 40))
    with pytest.raises(ChildDied, match=r"SIGXCPU|SIGKILL"):
        within_limits(lambda: sum(iter(int, 1)), most_cpu_s=1)
    with pytest.raises(ChildDied, match="KeyError"):
        within_limits(lambda: {}["a"])
