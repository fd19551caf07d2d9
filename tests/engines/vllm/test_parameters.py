"""Every parameter that our loader leaves in vLLM's models is, bit for bit, the one that vLLM's default loader
leaves. `make test-architectures` takes all architectures here, too; without it, those whose loading is odd.
"""

import os
from pathlib import Path

import pytest

from tests.support.tiny_models import ARCHITECTURES, make_model
from tests.support.vllm_inprocess import differences, load_state, load_states_in_ranks

pytestmark = pytest.mark.engine


# Transposed, all experts in one tensor, some that are needed as data while they are recorded.
ODD = ["bloom", "gpt-oss", "gpt2", "mamba"]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES) if "EXTENDED_TESTS" in os.environ else ODD)
def test_parameters_equal_the_default_loaders(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture, tmp_path, shards=3)
    (expected,) = load_state(model, "auto")
    (loaded,) = load_state(model, "b10_3fs")
    assert expected
    assert differences(expected, loaded) == []


def test_parameters_are_right_when_every_block_is_tiny_and_the_python_engine_reads(tmp_path: Path) -> None:
    model = make_model("qwen3-moe", tmp_path, shards=2)
    (expected,) = load_state(model, "auto")
    options = {"engine": "python", "threads": 1, "buffer_bytes": "1MiB", "block_bytes": "64KiB", "io_bytes": "4KiB"}
    (loaded,) = load_state(model, "b10_3fs", options)
    assert differences(expected, loaded) == []


def test_every_rank_of_tensor_parallel_2_holds_the_default_loaders_parameters(tmp_path: Path) -> None:
    names = ["llama-tied", "mixtral"]
    models = [make_model(name, tmp_path / name, shards=2) for name in names]
    jobs = [(model, load_format, {}, {}) for model in models for load_format in ("auto", "b10_3fs")]
    states = load_states_in_ranks(jobs, tp=2)
    for number, name in enumerate(names):
        for rank in range(2):
            found = differences(states[2 * number][rank], states[2 * number + 1][rank])
            assert found == [], f"{name}, rank {rank}"
