"""``engine-loader convert``, as a user runs it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.running import invoke, run
from tests.support.training_checkpoints import save_training


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return save_training({"a": torch.randn(40, 30), "b": torch.randn(9)}, tmp_path / "step-1", "fsdp")


def test_a_training_becomes_a_model_and_a_training_again(training: Path, tmp_path: Path) -> None:
    (training / "config.json").write_text("{}")
    out = tmp_path / "model"
    done = run("convert", training, out, "--key-mapping", '{"^model[.]": ""}', "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 1 file, 2 tensors, 2.36 KiB; left out: optimizer state (2 tensors, 4.72 KiB)\n"
    assert done.stderr == ""  # no bar where there is no terminal
    tensors = load_file(out / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys("ab", torch.bfloat16)
    assert (out / "config.json").exists()

    done = invoke("convert", out, tmp_path / "again", "--to", "dcp", "--items", "safetensors")
    assert done.exit_code == 0, done.output
    again = load_file(tmp_path / "again" / "__0_0.distcp")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_program_is_told_what_was_written(training: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = invoke("convert", training, out, "--json")
    assert json.loads(done.stdout) == {
        "destination": str(out),
        "files": [str(out / "model.safetensors")],
        "tensors": 2,
        "bytes": (40 * 30 + 9) * 4,
        "left_out": "optimizer state (2 tensors, 4.72 KiB)",
    }


def test_shards_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    save_file({f"t{number}": torch.zeros(1000) for number in range(10)}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    done = invoke("convert", tmp_path / "model.safetensors", out, "--max-shard-size", "12KiB")
    assert done.exit_code == 0, done.output
    assert len(list(out.glob("*.safetensors"))) == 4
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == {
        f"t{number}" for number in range(10)
    }


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--to", "sharded_state"], 1, "engine-loader reshard {src} {dst} --tensor-parallel-size N"),
        (
            ["--key-mapping", '{"(": ""}'],
            2,
            "--key-mapping: key_mapping = '{\"(\": \"\"}': '(' is no regular expression",
        ),
        (["--key-mapping", "{nothing}"], 2, "--key-mapping: key_mapping = '{nothing}': this is no valid JSON"),
        (["--key-mapping", "no:such"], 2, "key_mapping: the module 'no' of 'no:such' cannot be imported"),
        (["--max-shard-size", "many"], 2, "--max-shard-size: 'many' is not a size like 5GB"),
        (["--max-shard-size", "0"], 2, "--max-shard-size: '0' is less than one byte"),
        (["--to", "gguf"], 2, "'gguf' is not one of"),
    ],
)
def test_what_cannot_be_done_is_told(
    arguments: list[str], status: int, told: str, training: Path, tmp_path: Path
) -> None:
    done = invoke("convert", training, tmp_path / "out", *arguments)
    assert done.exit_code == status
    told = told.replace("{src}", str(training)).replace("{dst}", str(tmp_path / "out"))
    assert told in done.output
    assert not (tmp_path / "out").exists()


def test_help_says_where_sharded_state_comes_from() -> None:
    done = invoke("convert", "--help")
    assert "engine-loader reshard" in done.output
    assert "s3://" in done.output
