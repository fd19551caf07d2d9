"""``engine-loader explain-load`` and ``reshard``, as a user runs them."""

import json
from pathlib import Path

import pytest

from tests.cli.running import invoke
from tests.support.moto_server import MotoServer
from tests.support.tiny_models import make_model


@pytest.mark.engine
def test_explain_load_says_what_a_rank_reads_and_reshard_writes_just_that(tmp_path: Path) -> None:
    model = make_model("qwen3-moe", tmp_path / "model", shards=2, moe_intermediate_size=128)
    done = invoke("explain-load", model, "-tp", "2", "--rank", "1", "--enable-expert-parallel", "--json", "--tensors")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    totals, tensors = answer["totals"], {row["name"]: row for row in answer["tensors"]}
    assert totals["all"]["tensors"] == len(tensors)
    assert totals["experts"]["not_read"] == totals["experts"]["tensors"] / 2
    assert totals["experts"]["read_bytes"] == totals["experts"]["kept_bytes"] == totals["experts"]["file_bytes"] / 2
    assert tensors["model.layers.0.self_attn.q_proj.weight"]["ways"] == ["rows"]
    assert tensors["model.layers.0.self_attn.o_proj.weight"]["ways"] == ["read through"]
    assert tensors["model.layers.0.mlp.experts.0.up_proj.weight"]["ways"] == ["not read"]
    assert answer["cost_model"]["gap_bytes"] == 4096
    machine = answer["machine"]
    assert machine["ranks"] == 2
    assert totals["all"]["file_bytes"] <= machine["read_bytes"] < machine["read_bytes_apart"]

    with MotoServer() as moto:  # the same model in a bucket
        moto.put("bucket", {f"model/{path.name}": path.read_bytes() for path in model.iterdir()})
        env = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": moto.url,
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        done = invoke("explain-load", "s3://bucket/model", "-tp", "2", "--rank", "1", "--json", env=env)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["totals"]["all"]["file_bytes"] == totals["all"]["file_bytes"]

    done = invoke("reshard", model, tmp_path / "out", "-tp", "2", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "2 files" in done.stdout
    done = invoke("reshard", model, tmp_path / "out", "-tp", "2")
    assert done.exit_code == 1
    assert "the destination holds something" in done.output


def test_a_rank_that_there_is_not_is_an_error(tmp_path: Path) -> None:
    result = invoke("explain-load", tmp_path, "-tp", "2", "--rank", "2")
    assert result.exit_code == 2
    assert "no rank 2 of 2" in result.output
