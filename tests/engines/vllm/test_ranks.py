"""Ranks of parallel layouts: each holds what vLLM's default loader gives it, and reads little more than that.

Every rank is played in this process, without the others (engines/vllm_rank.py).
"""

from pathlib import Path

import pytest

from engine_loader.engines.vllm.rank import Rank
from tests.support.tiny_models import make_model
from tests.support.vllm_inprocess import differences, load_state_as, rank_as

pytestmark = pytest.mark.engine

WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
ARCHITECTURES = [
    "llama",
    "qwen3",
    "mixtral",
    "qwen3-moe",
    "deepseek-v2",
    "gemma3",
    "qwen2",
    "olmoe",
    "gpt-oss",
    "llama-w8a8",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_of_tensor_parallel_2_and_4_hold_the_default_loaders_parameters(
    architecture: str, tmp_path: Path
) -> None:
    model = make_model(architecture, tmp_path, shards=2, num_key_value_heads=4)
    for rank in (Rank(2, rank=1), Rank(4, rank=2)):
        expected, _ = load_state_as(model, "auto", rank)
        loaded, _ = load_state_as(model, "b10_3fs", rank, {"mode": "direct"})
        assert differences(expected, loaded) == [], rank


def test_what_a_rank_of_tensor_parallel_4_reads(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, shards=2, **WIDE, intermediate_size=1024, vocab_size=1024)
    rank = Rank(4, rank=3)
    with rank_as(model, "b10_3fs", rank, {"mode": "direct"}, dtype="bfloat16", max_model_len=256) as built:
        explanation = built.loader.explain(built.module, built.config.model_config)
        built.load()
        (report,) = built.loader.last_load.reports
    plans = explanation.tensors.values()
    assert report.bytes_loaded == sum(plan.kept_bytes for plan in plans)
    # What was counted at the source is what was foretold.
    assert report.bytes_read == pytest.approx(sum(plan.read_bytes for plan in plans), rel=0.02)
    inner = [plan for plan in plans if plan.info.name.endswith(("o_proj.weight", "down_proj.weight"))]
    rest = [plan for plan in plans if plan not in inner]
    assert len(inner) == 4
    assert all(plan.read_bytes <= plan.info.nbytes for plan in inner)
    inner_bytes = sum(plan.info.nbytes for plan in inner)
    assert report.bytes_read <= inner_bytes + 1.1 * sum(plan.kept_bytes for plan in rest)
    assert sum(plan.kept_bytes for plan in rest) < 0.3 * sum(plan.info.nbytes for plan in rest)


def test_experts_of_other_ranks_are_never_read(tmp_path: Path) -> None:
    model = make_model("qwen3-moe", tmp_path, shards=2, moe_intermediate_size=128)
    rank = Rank(2, rank=1, expert_parallel=True)
    expected, _ = load_state_as(model, "auto", rank)
    with rank_as(model, "b10_3fs", rank, {"mode": "direct"}, dtype="bfloat16", max_model_len=256) as built:
        explanation = built.loader.explain(built.module, built.config.model_config)
    loaded, loader = load_state_as(model, "b10_3fs", rank, {"mode": "direct"})
    assert differences(expected, loaded) == []
    experts = {name: plan for name, plan in explanation.tensors.items() if ".experts." in name}
    theirs = [plan for name, plan in experts.items() if ".experts.0." in name or ".experts.1." in name]
    assert len(experts) == 2 * len(theirs) == 24
    assert [plan.read_bytes for plan in theirs] == [0] * len(theirs)
    (report,) = loader.last_load.reports
    foretold = sum(plan.read_bytes for plan in explanation.tensors.values())
    assert report.bytes_read == pytest.approx(foretold, rel=0.02)


def test_layers_of_other_pipeline_stages_are_never_read(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, shards=2, num_hidden_layers=4)
    rank = Rank(1, 2, rank=1)
    expected, _ = load_state_as(model, "auto", rank)
    with rank_as(model, "b10_3fs", rank, {"mode": "direct"}, dtype="bfloat16", max_model_len=256) as built:
        explanation = built.loader.explain(built.module, built.config.model_config)
    loaded, loader = load_state_as(model, "b10_3fs", rank, {"mode": "direct"})
    assert differences(expected, loaded) == []
    theirs = [plan for name, plan in explanation.tensors.items() if ".layers.0." in name or ".layers.1." in name]
    assert len(theirs) == 18
    assert [plan.read_bytes for plan in theirs] == [0] * len(theirs)
    (report,) = loader.last_load.reports
    assert report.bytes_read <= 1.1 * sum(plan.kept_bytes for plan in explanation.tensors.values())
