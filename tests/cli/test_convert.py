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
            "--key-mapping: key_mapping = '{\"(\": \"\"}': '(' is not a regular expression",
        ),
        (["--key-mapping", "{nothing}"], 2, "--key-mapping: key_mapping = '{nothing}': this is not valid JSON"),
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


class TestPyTorchFiles:
    """Only .bin files: they become safetensors, and nothing in them is run."""

    @pytest.fixture
    def pickled(self, tmp_path: Path) -> Path:
        (tmp_path / "model").mkdir()
        first = {"a": torch.randn(10, 3).t(), "n": torch.arange(5)}
        torch.save(first, tmp_path / "model" / "pytorch_model-00001-of-00002.bin")
        old = {"b": torch.randn(4)}
        path = tmp_path / "model" / "pytorch_model-00002-of-00002.bin"
        torch.save(old, path, _use_new_zipfile_serialization=False)
        torch.save({"lr": 1}, tmp_path / "model" / "training_args.bin")
        (tmp_path / "model" / "config.json").write_text('{"torch_dtype": "float32"}')
        (tmp_path / "model" / "pytorch_model.bin.index.json").write_text("{}")
        return tmp_path / "model"

    def test_they_become_a_model(self, pickled: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        done = invoke("convert", pickled, out, "--dtype", "bfloat16", "--key-mapping", '{"^n$": null}')
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{out}: 1 file, 2 tensors, 68 B\n"
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
        assert json.loads((out / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
        expected = {
            name: tensor
            for path in pickled.glob("pytorch_model-*.bin")
            for name, tensor in torch.load(path, weights_only=True).items()
        }
        written = load_file(out / "model.safetensors")
        assert set(written) == {"a", "b"}
        assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in written.items())

    def test_what_would_run_code_is_refused(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return (Path.touch, (tmp_path / "ran",))

        (tmp_path / "model").mkdir()
        torch.save({"a": torch.zeros(2), "b": Evil()}, tmp_path / "model" / "pytorch_model.bin")
        done = invoke("convert", tmp_path / "model", tmp_path / "out")
        assert done.exit_code == 1
        assert "torch cannot load it: " in done.stderr
        assert "no code of the file is run" in done.stderr
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ({"model": {"a": torch.zeros(1)}}, "this holds no dictionary of tensors by name (save model.state_dict())"),
            ([torch.zeros(1)], "this holds no dictionary of tensors by name (save model.state_dict())"),
        ],
        ids=["nested", "list"],
    )
    def test_what_holds_no_tensors_by_name(self, content: object, told: str, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        torch.save(content, tmp_path / "model" / "pytorch_model.bin")
        done = invoke("convert", tmp_path / "model", tmp_path / "out")
        assert done.stderr == f"error: {tmp_path}/model/pytorch_model.bin: {told}\n"

    def test_to_a_training_they_go_by_way_of_safetensors(self, pickled: Path, tmp_path: Path) -> None:
        done = invoke("convert", pickled, tmp_path / "out", "--to", "dcp")
        assert (
            "written as safetensors, at most under other names (convert them, and then what was written)" in done.stderr
        )
