"""``engine-loader inspect``: what is in a checkpoint, and everything that is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from tests.cli.running import invoke, run
from tests.support.checkpoints import checkpoint, encode, entry, index
from tests.support.training_checkpoints import save_chunked

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards and an index: five tensors of three types."""
    one = {"embed": entry("BF16", [64, 16]), "norm": entry("F32", [16])}
    two = {"layers.0": entry("BF16", [16, 16]), "layers.1": entry("BF16", [16, 16]), "scale": entry("F8_E4M3", [])}
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(checkpoint(one, {"format": "pt"}))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(checkpoint(two))
    names = dict.fromkeys(one, "model-00001-of-00002.safetensors")
    names |= dict.fromkeys(two, "model-00002-of-00002.safetensors")
    (tmp_path / INDEX).write_bytes(index(names))
    return tmp_path


def as_json(*arguments: str | Path, status: int = 0) -> Any:
    result = invoke("inspect", "--json", *arguments)
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def problems(path: Path) -> list[dict[str, Any]]:
    """Everything that is found wrong; the file of each is given relative to ``path``."""
    found = as_json("--check", path, status=1)["check"]
    assert found["sound"] is False
    return [
        {**problem, "file": problem["file"] and str(Path(problem["file"]).relative_to(path))}
        for problem in found["problems"]
    ]


class TestWhatIsThere:
    def test_totals_types_and_files(self, model: Path) -> None:
        found = as_json(model)
        assert found["totals"] == {
            "files": 2,
            "file_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
            "tensors": 5,
            "tensor_bytes": 64 * 16 * 2 + 16 * 4 + 2 * 16 * 16 * 2 + 1,
        }
        assert found["dtypes"] == [
            {"dtype": "BF16", "tensors": 3, "bytes": 3072},
            {"dtype": "F32", "tensors": 1, "bytes": 64},
            {"dtype": "F8_E4M3", "tensors": 1, "bytes": 1},
        ]
        assert found["index"] == str(model / INDEX)
        assert [(Path(file["file"]).name, file["tensors"], file["metadata"]) for file in found["files"]] == [
            ("model-00001-of-00002.safetensors", 2, {"format": "pt"}),
            ("model-00002-of-00002.safetensors", 3, {}),
        ]
        assert "tensors" not in found and "check" not in found

    def test_the_largest_come_first(self, model: Path) -> None:
        largest = as_json(model)["largest"]
        assert [tensor["name"] for tensor in largest] == ["embed", "layers.0", "layers.1", "norm", "scale"]
        first = largest[0]
        assert (first["dtype"], first["shape"], first["bytes"]) == ("BF16", [64, 16], 2048)
        assert first["file"] == str(model / "model-00001-of-00002.safetensors")

    def test_all_tensors_are_listed_on_demand_with_their_places(self, model: Path) -> None:
        tensors = as_json("--tensors", model)["tensors"]
        assert [tensor["name"] for tensor in tensors] == ["embed", "norm", "layers.0", "layers.1", "scale"]
        for tensor in tensors:
            content = Path(tensor["file"]).read_bytes()[tensor["offset"] : tensor["offset"] + tensor["bytes"]]
            assert len(content) == tensor["bytes"]
        assert tensors[-1]["shape"] == []

    def test_a_person_sees_names_shapes_and_sizes(self, model: Path) -> None:
        output = invoke("inspect", "--tensors", model).output
        lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
        assert lines["embed"].split()[1:] == ["64", "×", "16", "BF16", "2.00", "KiB"]
        assert lines["scale"].split()[1:] == ["scalar", "F8_E4M3", "1", "B"]
        assert "model-00002-of-00002.safetensors" in output

    def test_nothing_is_cut_off_or_folded_in_a_pipe(self, tmp_path: Path) -> None:
        name = "model." + "very_long_" * 12 + "name"
        (tmp_path / "model.safetensors").write_bytes(checkpoint({name: entry("U8", [4])}))
        assert name in run("inspect", "--tensors", tmp_path, env={"COLUMNS": "40"}).stdout

    def test_a_single_file_and_an_empty_checkpoint(self, tmp_path: Path) -> None:
        file = tmp_path / "only.safetensors"
        file.write_bytes(checkpoint({}))
        found = as_json("--check", file)
        assert found["totals"]["tensors"] == 0
        assert found["check"] == {"sound": True, "problems": [], "notes": []}
        assert invoke("inspect", file).exit_code == 0

    def test_names_that_a_terminal_would_obey_are_shown_escaped(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(checkpoint({"\x1b[31mred\n[bold]": entry("U8", [4])}))
        output = invoke("inspect", "--tensors", tmp_path).output
        assert "\\x1b[31mred\\n[bold]" in output
        assert "\x1b[31m" not in output
        assert as_json("--tensors", tmp_path)["tensors"][0]["name"] == "\x1b[31mred\n[bold]"

    def test_a_path_whose_bytes_are_no_text(self, tmp_path: Path) -> None:
        file = tmp_path / "model-\udcff.safetensors"
        file.write_bytes(checkpoint({"a": entry("U8", [4])}))
        done = run("inspect", file)
        assert done.returncode == 0, done.stderr
        assert "model-\\udcff.safetensors" in done.stdout

    def test_tensors_that_the_index_does_not_list_are_not_counted(self, model: Path) -> None:
        names = json.loads((model / INDEX).read_text())["weight_map"]
        del names["scale"]
        (model / INDEX).write_bytes(index(names))
        found = as_json("--check", model)
        assert found["totals"]["tensors"] == 4
        (note,) = found["check"]["notes"]
        assert note.endswith("model-00002-of-00002.safetensors: 1 tensor is not in the index and will not be loaded")


class TestCheck:
    def test_a_sound_checkpoint(self, model: Path) -> None:
        result = invoke("inspect", "--check", model)
        assert result.exit_code == 0
        assert "sound: the headers of 2 files, and the index fits them" in result.output

    def test_every_damaged_file_is_reported_not_only_the_first(self, model: Path) -> None:
        one, two = sorted(model.glob("*.safetensors"))
        one.write_bytes(b"")
        two.write_bytes(two.read_bytes()[:-1])
        result = invoke("inspect", "--check", model)
        assert result.exit_code == 1
        assert f"✗ {one}: the file is empty; the index puts 2 tensors into it" in result.output
        assert f"✗ {two}: the data is cut short" in result.output
        assert f"2 problems in {model}" in result.output

    def test_without_check_the_first_problem_is_an_error(self, model: Path) -> None:
        sorted(model.glob("*.safetensors"))[1].write_bytes(b"")
        result = invoke("inspect", model)
        assert result.exit_code == 1
        assert "the file is empty" in result.stderr

    def test_shards_that_are_missing(self, model: Path) -> None:
        (model / "model-00002-of-00002.safetensors").unlink()
        (problem,) = problems(model)
        assert problem["file"] == "model-00002-of-00002.safetensors"
        assert "[ENOENT]; the index puts 3 tensors into it" in problem["message"]

    def test_shards_that_are_missing_without_an_index(self, model: Path) -> None:
        (model / INDEX).unlink()
        (model / "model-00001-of-00002.safetensors").unlink()
        (problem,) = problems(model)
        assert problem == {
            "file": "model-00001-of-00002.safetensors",
            "offset": None,
            "message": "this shard is not there",
            "hint": "the download is not complete: fetch it",
        }

    def test_tensors_that_are_not_where_the_index_puts_them(self, model: Path) -> None:
        names = json.loads((model / INDEX).read_text())["weight_map"]
        names["norm"] = "model-00002-of-00002.safetensors"
        names["ghost"] = "model-00001-of-00002.safetensors"
        (model / INDEX).write_bytes(index(names))
        found = {problem["message"].split("'")[1]: problem for problem in problems(model)}
        assert set(found) == {"norm", "ghost"}
        assert found["norm"]["hint"] == f"it is in {model / 'model-00001-of-00002.safetensors'}"
        assert "no file has it" in found["ghost"]["hint"]

    def test_an_index_that_is_no_json(self, model: Path) -> None:
        (model / INDEX).write_text("{")
        (problem,) = problems(model)
        assert problem["file"] == INDEX
        assert "the index is not valid JSON" in problem["message"]

    def test_the_same_tensor_twice_without_an_index(self, tmp_path: Path) -> None:
        for name in ("a.safetensors", "b.safetensors"):
            (tmp_path / name).write_bytes(checkpoint({"x": entry("U8", [4]), name: entry("U8", [4])}))
        (problem,) = problems(tmp_path)
        assert problem["file"] == "b.safetensors"
        assert problem["message"] == f"'x' is also in {tmp_path / 'a.safetensors'}"

    def test_tensors_that_torch_cannot_hold(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(
            checkpoint({"odd": entry("F4", [2, 3]), "even": entry("F4", [3, 2])})
        )
        (problem,) = problems(tmp_path)
        assert problem["message"].startswith("'odd': F4 [2, 3] cannot be a torch tensor")

    def test_files_that_the_index_does_not_use_are_only_noted(self, model: Path) -> None:
        (model / "consolidated.safetensors").write_bytes(b"")
        found = as_json("--check", model)["check"]
        assert found["sound"] is True
        assert found["notes"] == [f"{model / 'consolidated.safetensors'}: the index does not use this file"]

    @pytest.mark.parametrize("what", ["missing", "empty directory", "only .bin"])
    def test_no_checkpoint_at_all(self, what: str, tmp_path: Path) -> None:
        path = tmp_path / "model"
        if what != "missing":
            path.mkdir()
        if what == "only .bin":
            (path / "pytorch_model.bin").touch()
        result = invoke("inspect", "--check", path)
        assert result.exit_code == 1
        assert f"1 problem in {path}" in result.output

    def test_a_damaged_header_is_told_with_its_reason(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(encode("{", b"", length=1 << 62))
        (tmp_path / "b.safetensors").write_bytes(encode({"x": {"dtype": "Q8", "shape": [], "data_offsets": [0, 0]}}))
        first, second = problems(tmp_path)
        assert (first["file"], second["file"]) == ("a.safetensors", "b.safetensors")
        assert str(1 << 62) in first["message"]
        assert "unknown dtype 'Q8'" in second["message"]


class TestTrainings:
    """Of torch.distributed.checkpoint, told by the training's names."""

    @pytest.fixture
    def training(self, tmp_path: Path) -> Path:
        """Two tensors in two parts each, and one of an optimizer."""
        tensors = {
            "model.a": torch.arange(64 * 10, dtype=torch.float32).reshape(64, 10),
            "model.b": torch.ones(8, 3, dtype=torch.bfloat16),
            "optimizer.state.a": torch.zeros(4),
        }
        save_chunked(tensors, tmp_path / "training", lambda _, tensor: [[len(tensor) // 2]])
        return tmp_path / "training"

    def test_tensors_and_files(self, training: Path) -> None:
        found = as_json("--tensors", training)
        assert found["format"] == "torch.distributed.checkpoint"
        assert {one["name"]: (one["dtype"], one["shape"], one["bytes"]) for one in found["tensors"]} == {
            "model.a": ("F32", [64, 10], 2560),
            "model.b": ("BF16", [8, 3], 48),
            "optimizer.state.a": ("F32", [4], 16),
        }
        assert found["totals"]["tensor_bytes"] == 2560 + 48 + 16
        files = [(Path(one["file"]).name, one["tensors"], one["bytes"]) for one in found["files"]]
        assert files == [(name, 3, (training / name).stat().st_size) for name in ("__0_0.distcp", "__1_0.distcp")]

    def test_what_is_no_tensor_is_named(self, tmp_path: Path) -> None:
        torch_dcp.save({"w": torch.ones(3), "step": 7}, checkpoint_id=tmp_path, no_dist=True)
        assert as_json("--tensors", tmp_path)["other_items"] == ["step"]
        assert "1 item is not a tensor: step" in invoke("inspect", tmp_path).stdout

    def test_a_sound_one(self, training: Path) -> None:
        result = invoke("inspect", "--check", training)
        assert result.exit_code == 0
        assert "sound: 2 files, and the metadata fits them" in result.stdout

    def test_every_part_that_is_cut_off_is_told(self, training: Path) -> None:
        content = (training / "__1_0.distcp").read_bytes()
        (training / "__1_0.distcp").write_bytes(content[: len(content) // 2])
        found = problems(training)
        assert [problem["file"] for problem in found] == ["__1_0.distcp"] * len(found)
        assert "'optimizer.state.a'" in found[-1]["message"]

    def test_a_file_that_is_missing(self, training: Path) -> None:
        (training / "__0_0.distcp").unlink()
        (problem,) = problems(training)
        assert problem["file"] == "__0_0.distcp"

    def test_metadata_of_another_save(self, training: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        tensors = {"model.a": torch.zeros(32, 20), "model.b": torch.ones(8, 3, dtype=torch.bfloat16)}
        save_chunked(tensors, other, lambda _, tensor: [[len(tensor) // 2]])
        (training / ".metadata").write_bytes((other / ".metadata").read_bytes())
        found = problems(training)
        assert any("'model.a' is torch.float32 [32, 10] in the file" in problem["message"] for problem in found), found

    def test_damaged_metadata(self, training: Path) -> None:
        (training / ".metadata").write_bytes(b"no pickle")
        (problem,) = problems(training)
        assert problem["file"] == ".metadata"
