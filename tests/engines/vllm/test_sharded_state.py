"""sharded_state checkpoints: written as vLLM writes them, and read into the parameters of every rank."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.engines.vllm.rank import Rank
from engine_loader.engines.vllm.sharded import reshard
from tests.support.tiny_models import make_model
from tests.support.vllm_inprocess import differences, load_state_as

from .test_headers import partly_quantised

pytestmark = pytest.mark.engine

ARGUMENTS = {"dtype": "bfloat16", "max_model_len": 256}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama-tied", tmp_path_factory.mktemp("original"), shards=2)


@pytest.fixture(scope="module")
def sharded(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "tp2"
    reshard(str(original), str(out), Rank(2), max_file_bytes=300_000, **ARGUMENTS)
    return out


def test_it_is_vllms_layout_with_what_else_a_model_has(original: Path, sharded: Path) -> None:
    names = {path.name for path in sharded.iterdir()}
    assert {"model-rank-0-part-0.safetensors", "model-rank-1-part-1.safetensors"} <= names
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith("index.json")]
    assert [path.name for path in sharded.parent.iterdir()] == ["tp2"]


@pytest.mark.parametrize("mode", ["direct", "stream"])
def test_every_rank_gets_what_the_original_gives_it(mode: str, original: Path, sharded: Path) -> None:
    for number in range(2):
        expected, _ = load_state_as(original, "auto", Rank(2, rank=number))
        loaded, loader = load_state_as(sharded, "b10_3fs", Rank(2, rank=number), {"mode": mode})
        assert differences(expected, loaded) == []
        if mode == "direct":
            (report,) = loader.last_load.reports
            own = sum(path.stat().st_size for path in sharded.glob(f"model-rank-{number}-*"))
            assert report.bytes_read <= own


def test_vllms_own_loader_reads_it(original: Path, sharded: Path) -> None:
    expected, _ = load_state_as(original, "auto", Rank(2, rank=1))
    loaded, _ = load_state_as(sharded, "sharded_state", Rank(2, rank=1))
    assert differences(expected, loaded) == []


def test_pipeline_stages(original: Path, tmp_path: Path) -> None:
    reshard(str(original), str(tmp_path / "out"), Rank(2, 2), **ARGUMENTS)
    assert len(list((tmp_path / "out").glob("model-pp-?-tp-?-part-0.safetensors"))) == 4
    expected, _ = load_state_as(original, "auto", Rank(2, 2, rank=3))
    loaded, _ = load_state_as(tmp_path / "out", "b10_3fs", Rank(2, 2, rank=3))
    # On the last stage the embedding is there for the head only, and the head has its own now.
    assert torch.equal(expected.pop("model.embed_tokens.weight"), loaded["lm_head.weight"])
    assert differences(expected, loaded) == []


def test_a_pattern_of_ones_own(original: Path, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "mine")
    for path in (tmp_path / "mine").glob("model-rank-*"):
        path.rename(path.with_name(path.name.replace("model-rank-", "mine-").replace("-part-", "_")))
    expected, _ = load_state_as(original, "auto", Rank(2, rank=1))
    loaded, _ = load_state_as(
        tmp_path / "mine", "b10_3fs", Rank(2, rank=1), {"sharded_pattern": "mine-{rank}_{part}.safetensors"}
    )
    assert differences(expected, loaded) == []
    with pytest.raises(CheckpointError, match="no file is named"):
        load_state_as(original, "b10_3fs", Rank(), {"sharded_pattern": "mine-{rank}_{part}.safetensors"})


def test_a_padded_vocabulary_is_filled_in_part_and_another_type_is_converted(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "less")
    for path in (tmp_path / "less").glob("model-rank-0-*"):
        tensors = load_file(path)
        for name in tensors:
            if name == "model.embed_tokens.weight":
                tensors[name] = tensors[name][:-8].contiguous()
            if name == "model.norm.weight":
                tensors[name] = tensors[name].float()
        save_file(tensors, path)
    whole, _ = load_state_as(sharded, "b10_3fs", Rank(2))
    less, _ = load_state_as(tmp_path / "less", "b10_3fs", Rank(2))
    theirs, _ = load_state_as(tmp_path / "less", "sharded_state", Rank(2))
    assert differences(theirs, less) == []
    name = "model.embed_tokens.weight"
    assert torch.equal(less[name][:-8], whole[name][:-8])
    assert torch.equal(less["model.norm.weight"], whole["model.norm.weight"])


def test_what_does_not_fit_is_an_error(original: Path, sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"files of 2 ranks.*of 4.*reshard"):
        load_state_as(sharded, "b10_3fs", Rank(4, rank=1))
    shutil.copytree(sharded, tmp_path / "missing")
    (tmp_path / "missing" / "model-rank-0-part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="of the model's tensors are missing"):
        load_state_as(tmp_path / "missing", "b10_3fs", Rank(2))
    path = tmp_path / "missing" / "model-rank-0-part-0.safetensors"
    save_file({**load_file(path), "other": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="'other' is not in the model"):
        load_state_as(tmp_path / "missing", "b10_3fs", Rank(2))
    for model, out, message in (
        (sharded, tmp_path / "a", "sharded_state checkpoint already"),
        (original, sharded, "the destination holds something"),
        (tmp_path, tmp_path / "a", "no config.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            reshard(str(model), str(out), Rank(2), **ARGUMENTS)


def test_nothing_is_left_of_a_reshard_that_fails(original: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(original, broken)
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    (broken / next(iter(index["weight_map"].values()))).write_bytes(b"nothing")
    (tmp_path / "outs").mkdir()
    with pytest.raises(Exception, match=r".*"):
        reshard(str(broken), str(tmp_path / "outs" / "out"), Rank(2), **ARGUMENTS)
    assert list((tmp_path / "outs").iterdir()) == []


def test_open_checkpoint_takes_one_ranks_part(sharded: Path) -> None:
    with open_checkpoint(sharded, rank=1) as checkpoint:
        expected = {}
        for path in sharded.glob("model-rank-1-*"):
            expected |= load_file(path)
        assert set(checkpoint.keys()) == set(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.tensors())
    with pytest.raises(CheckpointError, match=r"2 ranks.*rank=0"):
        open_checkpoint(sharded)
    with pytest.raises(CheckpointError, match="files of 2 ranks, but none of rank 7"):
        open_checkpoint(sharded, rank=7)


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("how", ["gptq", "awq"])
def test_a_quantised_model_is_loaded_as_the_original(how: str, partly: bool, tmp_path: Path) -> None:
    """What is quantised stands in the original's headers only, under names that the written files do not have."""
    model = partly_quantised(tmp_path / "model", how) if partly else make_model(f"llama-{how}", tmp_path / "model")
    for rank in (Rank(), Rank(2, rank=1)):
        out = tmp_path / f"tp{rank.tensor_parallel_size}"
        reshard(str(model), str(out), Rank(rank.tensor_parallel_size), **ARGUMENTS)
        expected, _ = load_state_as(model, "auto", rank)
        for mode in ("direct", "stream"):
            assert differences(expected, load_state_as(out, "b10_3fs", rank, {"mode": mode})[0]) == []
        assert differences(expected, load_state_as(out, "sharded_state", rank)[0]) == []
