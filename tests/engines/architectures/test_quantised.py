"""Quantised checkpoints in every mode: what is loaded, before vLLM makes of it what its kernels want.

`make test-architectures` takes all ways; without it, a few.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .comparing import compare_modes, load
from .quantising import WAYS, any_kernel, make_mistral_fp8, make_mxfp4, make_quantised

pytestmark = pytest.mark.engine

EXTENDED = "EXTENDED_TESTS" in os.environ
LINEAR = sorted(WAYS) if EXTENDED else ["compressed-tensors-w4a16", "modelopt-fp8"]
EXPERTS = (
    ["compressed-tensors-fp8-channel", "compressed-tensors-fp8-static", "fp8-block"] if EXTENDED else ["fp8-block"]
)


@pytest.fixture(autouse=True)
def _any_kernel() -> Iterator[None]:
    with any_kernel():
        yield


def check(directory: Path, **arguments: Any) -> None:
    expected = load(directory, "auto", {}, **arguments)
    assert compare_modes(directory, expected, **arguments) == {}


@pytest.mark.parametrize("way", LINEAR)
def test_linear_layers(way: str, tmp_path: Path) -> None:
    check(make_quantised(way, "llama", tmp_path))


@pytest.mark.parametrize("way", EXPERTS)
def test_experts(way: str, tmp_path: Path) -> None:
    check(make_quantised(way, "qwen3-moe", tmp_path))


@pytest.mark.parametrize("make", [make_mxfp4, make_mistral_fp8])
def test_as_published(make: Callable[[Path], Path], tmp_path: Path) -> None:
    check(make(tmp_path))
