"""Quantised checkpoints in every mode: what is loaded, before vLLM makes of it what its kernels want.

`make test-architectures` takes all ways; without it, a few.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.vllm_inprocess import State

from .comparing import compare_modes, load
from .quantising import WAYS, any_kernel, make_mistral_fp8, make_mxfp4, make_quantised

pytestmark = pytest.mark.engine

EXTENDED = "EXTENDED_TESTS" in os.environ
LINEAR = sorted(WAYS) if EXTENDED else ["compressed-tensors-w4a16", "modelopt-fp8"]
EXPERTS = {
    "awq": torch.int32,
    "compressed-tensors-fp8-channel": torch.float8_e4m3fn,
    "compressed-tensors-fp8-static": torch.float8_e4m3fn,
    "compressed-tensors-w4a16": torch.int32,
    "compressed-tensors-w8a8-int8": torch.int8,
    "fp8-block": torch.float8_e4m3fn,
    "gptq": torch.int32,
}
"""Way -> the dtype in which the model keeps the experts' weights."""


@pytest.fixture(autouse=True)
def _any_kernel() -> Iterator[None]:
    with any_kernel():
        yield


def check(directory: Path, **arguments: Any) -> State:
    expected = load(directory, "auto", {}, **arguments)
    assert compare_modes(directory, expected, **arguments) == {}
    return expected


@pytest.mark.parametrize("way", LINEAR)
def test_linear_layers(way: str, tmp_path: Path) -> None:
    check(make_quantised(way, "llama", tmp_path))


@pytest.mark.parametrize("way", EXPERTS if EXTENDED else ["fp8-block"])
def test_experts(way: str, tmp_path: Path) -> None:
    loaded = check(make_quantised(way, "qwen3-moe", tmp_path))
    weights = [name for name in loaded if re.search(r"\bw(13|2)_(weight|qweight|weight_packed)$", name)]
    assert {loaded[name].dtype for name in weights} == {EXPERTS[way]}


@pytest.mark.parametrize("make", [make_mxfp4, make_mistral_fp8])
def test_as_published(make: Callable[[Path], Path], tmp_path: Path) -> None:
    check(make(tmp_path))
