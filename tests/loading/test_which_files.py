"""Which files of a directory count as weights, and which of two copies of a tensor."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from engine_loader import CheckpointError, TensorNotFoundError, open_checkpoint
from engine_loader.cli import app
from engine_loader.conversion.convert import convert_checkpoint
from engine_loader.engines.common.weights_uri import training_checkpoint_at, weights_at
from engine_loader.formats.hf_index import INDEX_NAME
from engine_loader.loading.weights import check_weights, stream_weights
from engine_loader.settings import load_settings
from tests.support.checkpoints import index
from tests.support.moto_server import MotoServer
from tests.support.training_checkpoints import save_training

SETTINGS = load_settings({}).settings.loader
JUNK = b"\0\5\x16\7\0\2\0\0Mac OS X        "
"""How a file begins that macOS leaves beside a file with attributes."""


def put(path: Path, **values: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((4,), value) for name, value in values.items()}, path)
    return path


def streamed(files: Any) -> dict[str, float]:
    """What an engine is given, in the order in which it is: of a tensor that comes twice, it keeps the last."""
    return {name: float(tensor[0]) for name, tensor in stream_weights(files, SETTINGS)}


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """``b`` was moved from the second shard into the first, and the old one is still there."""
    put(tmp_path / "model-1.safetensors", a=1, b=2)
    put(tmp_path / "model-2.safetensors", b=99, c=3)
    names = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / INDEX_NAME).write_bytes(index(names))
    return tmp_path


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    """The index lists a tensor that no file has."""
    put(tmp_path / "model-1.safetensors", a=1)
    put(tmp_path / "model-2.safetensors", b=2)
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors", "mtp.fc.weight": "model-2.safetensors"}
    (tmp_path / INDEX_NAME).write_bytes(index(names))
    return tmp_path


def test_hidden_files_are_no_weights(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors", a=1)
    (tmp_path / "._model.safetensors").write_bytes(JUNK)
    (tmp_path / "._model-rank-0-part-0.safetensors").write_bytes(JUNK)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: float(tensor[0]) for name, tensor in checkpoint.tensors()} == {"a": 1}
    assert weights_at(str(tmp_path), SETTINGS) == [str(tmp_path / "model.safetensors")]
    assert weights_at(str(tmp_path), SETTINGS, patterns=["*.safetensors"]) == [str(tmp_path / "model.safetensors")]
    done = CliRunner().invoke(app, ["inspect", "--check", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "._model" not in done.output
    out = convert_checkpoint(str(tmp_path), str(tmp_path / "out"))
    assert out.tensors == 1


def test_a_training_checkpoint_with_hidden_files_is_still_one(tmp_path: Path) -> None:
    save_training({"a": torch.ones(4)}, tmp_path, "fsdp", prefix="")
    (tmp_path / "._model.safetensors").write_bytes(JUNK)
    assert training_checkpoint_at(str(tmp_path), SETTINGS) is not None
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.get_tensor("a"), torch.ones(4))


def test_a_stale_copy_of_a_tensor_loses_to_the_one_that_the_index_names(
    stale: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = weights_at(str(stale), SETTINGS)
    with caplog.at_level(logging.WARNING):
        pairs = list(stream_weights(files, SETTINGS))
    assert [name for name, _ in pairs] == ["a", "b", "c"]
    assert {name: float(tensor[0]) for name, tensor in pairs} == {"a": 1, "b": 2, "c": 3}
    assert f"such as 'b' in {stale}/model-2.safetensors" in caplog.text
    with open_checkpoint(stale) as checkpoint:
        assert float(checkpoint.get_tensor("b")[0]) == 2


def test_a_copy_counts_where_the_file_that_the_index_names_is_not_read_or_does_not_have_it(stale: Path) -> None:
    assert streamed([str(stale / "model-2.safetensors")]) == {"b": 99, "c": 3}
    put(stale / "model-1.safetensors", a=1)
    assert streamed(weights_at(str(stale), SETTINGS)) == {"a": 1, "b": 99, "c": 3}


def test_what_the_index_lists_and_no_file_has_is_a_warning(lacking: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = weights_at(str(lacking), SETTINGS)
    with caplog.at_level(logging.WARNING):
        assert streamed(files) == {"a": 1, "b": 2}
        check_weights(files, SETTINGS)
    assert "puts 'mtp.fc.weight' into 'model-2.safetensors', which does not have it" in caplog.text


def test_it_is_an_error_for_whoever_asks_for_it(lacking: Path) -> None:
    with open_checkpoint(lacking) as checkpoint:
        assert {name: float(tensor[0]) for name, tensor in checkpoint.tensors()} == {"a": 1, "b": 2}
        assert "mtp.fc.weight" not in checkpoint
        message = "puts 'mtp.fc.weight' into 'model-2.safetensors', which does not have it"
        with pytest.raises(TensorNotFoundError, match=message):
            checkpoint.get_tensor("mtp.fc.weight")
        with pytest.raises(TensorNotFoundError, match=message):
            checkpoint.load_into({"mtp.fc.weight": torch.zeros(4)})
        with pytest.raises(TensorNotFoundError, match="no tensor named 'mtp'"):
            checkpoint.get_tensor("mtp")


def test_inspect_reports_it_when_asked_to_check(lacking: Path) -> None:
    assert CliRunner().invoke(app, ["inspect", str(lacking)]).exit_code == 0
    done = CliRunner().invoke(app, ["inspect", "--check", str(lacking)])
    assert done.exit_code != 0
    assert "mtp.fc.weight" in done.output


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    put(tmp_path / "model.safetensors", top=1)
    put(tmp_path / "transformer" / "b.safetensors", b=2)
    put(tmp_path / "transformer" / "deep" / "x.safetensors", x=9)
    put(tmp_path / "vision_encoder" / "c.safetensors", c=3)
    put(tmp_path / "scheduler" / "d.safetensors", d=4)
    put(tmp_path / ".transformer" / "e.safetensors", e=5)
    return tmp_path


PATTERNS = [
    (["[tv]*er/*.safetensors"], ["transformer/b.safetensors", "vision_encoder/c.safetensors"]),
    (["consolidated*.safetensors", "scheduler/*.safetensors", "*.safetensors"], ["scheduler/d.safetensors"]),
    (["*.safetensors"], ["model.safetensors"]),
    (["transformer/deep/x.safetensors"], ["transformer/deep/x.safetensors"]),
]


@pytest.mark.parametrize(("patterns", "expected"), PATTERNS)
def test_patterns_may_name_folders_and_the_first_that_matches_counts(
    patterns: list[str], expected: list[str], folders: Path
) -> None:
    assert weights_at(str(folders), SETTINGS, patterns=patterns) == [str(folders / name) for name in expected]


def test_a_pattern_that_nothing_matches_is_an_error(folders: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file matches nothing/\*\.safetensors, \*\.pt"):
        weights_at(str(folders), SETTINGS, patterns=["nothing/*.safetensors", "*.pt"])


def test_patterns_with_folders_in_an_object_store(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MotoServer() as server:
        files = {path.relative_to(folders).as_posix(): path.read_bytes() for path in folders.rglob("*.safetensors")}
        server.put("models", {f"m/{name}": content for name, content in files.items()})
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for patterns, expected in PATTERNS:
            found = weights_at("s3://models/m", SETTINGS, patterns=patterns)
            assert found == [f"s3://models/m/{name}" for name in expected]
        found = weights_at("s3://models/m", SETTINGS, patterns=["[tv]*er/*.safetensors"])
        assert streamed(found) == {"b": 2, "c": 3}
