"""What a person names as a model: names of the hub are looked up in its local cache, by every command."""

import json
import os
from pathlib import Path

import pytest

from tests.cli.running import invoke
from tests.support.checkpoints import checkpoint, entry
from tests.support.moto_server import MotoServer


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache as huggingface_hub makes it: snapshots of links into blobs."""
    model = tmp_path / "hub" / "models--owner--tiny"
    (model / "blobs").mkdir(parents=True)
    (model / "blobs" / "abc").write_bytes(checkpoint({"a": entry("U8", [1 << 10])}))
    for revision in ("1111", "2222"):
        (model / "snapshots" / revision).mkdir(parents=True)
    (model / "snapshots" / "1111" / "model.safetensors").symlink_to("../../blobs/abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("1111")
    return tmp_path / "hub"


def test_every_command_finds_it(hub: Path, tmp_path: Path) -> None:
    env = {"HF_HUB_CACHE": str(hub)}
    snapshot = hub / "models--owner--tiny" / "snapshots" / "1111"
    inspected = json.loads(invoke("inspect", "owner/tiny", "--json", env=env).stdout)
    assert inspected["files"][0]["file"] == str(snapshot / "model.safetensors")
    measured = json.loads(
        invoke("bench", "read", "owner/tiny", "--json", "--no-peers", "--rounds", "1", "--threads", "1", env=env).stdout
    )
    assert measured["checkpoint"]["bytes"] == 1 << 10
    done = invoke("convert", "owner/tiny", tmp_path / "out", env=env)
    assert done.exit_code == 0, done.output
    found = json.loads(invoke("doctor", "--quick", "--json", "owner/tiny", env=env).stdout)
    assert any("all have a sound header" in finding["value"] for finding in found["findings"])


def test_one_that_is_not_there_is_told_with_the_command_that_downloads_it(hub: Path) -> None:
    env = {"HF_HUB_CACHE": str(hub)}
    for command in (["inspect"], ["bench", "read"], ["explain-load"]):
        done = invoke(*command, "owner/other", env=env)
        assert done.exit_code == 1
        assert done.stderr == (
            "error: owner/other: this is not a path here, and no model of this name is in the hub's local cache, "
            f"{hub} (check the path, or download the model: hf download owner/other)\n"
        )


def test_the_newest_snapshot_counts_where_no_branch_names_one(hub: Path) -> None:
    (hub / "models--owner--tiny" / "refs" / "main").unlink()
    snapshots = hub / "models--owner--tiny" / "snapshots"
    os.utime(snapshots / "1111", (2000, 2000))
    os.utime(snapshots / "2222", (1000, 1000))
    done = invoke("inspect", "owner/tiny", env={"HF_HUB_CACHE": str(hub)})
    assert done.exit_code == 0, done.output
    os.utime(snapshots / "2222", (3000, 3000))
    done = invoke("inspect", "owner/tiny", env={"HF_HUB_CACHE": str(hub)})
    assert done.stderr.startswith(f"error: {snapshots}/2222: no .safetensors file in this directory")


@pytest.mark.servers
def test_a_model_in_a_bucket_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with MotoServer() as moto:
        moto.put("bucket", {"model/model.safetensors": checkpoint({"a": entry("U8", [3 << 20])})})
        env = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": moto.url}
        done = invoke("bench", "read", "s3://bucket/model", "--rounds", "1", "--threads", "2", "--json", env=env)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        cold = invoke("bench", "read", "s3://bucket/model", "--cold", env=env)
    assert found["scenario"]["title"] == "an object store, into touched parameters"
    assert found["machine"]["file_system"] == "object store"
    assert [result["name"] for result in found["results"]] == [
        "plain requests, 2 threads",
        "engine_loader load_into",
        "engine_loader tensors() + copy_",
    ]
    assert all(result["verified"] and result["error"] is None for result in found["results"])
    assert cold.exit_code == 2
    assert "no page cache holds objects of an object store" in " ".join(cold.stderr.split())
