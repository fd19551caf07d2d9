"""The real SGLang on CPU: the same tokens and parameters as its own loader, in place updates, tensor parallelism."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.engines.sglang.conftest import VERSION, model_for_sglang
from tests.engines.sglang.serving import FORMAT, PROMPT, Served, digests, loaded_lines, running, served
from tests.support.sglang_server import TWO_RANKS
from tests.support.threefs import emulator
from tests.support.training_checkpoints import trained

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the same shapes with other weights."""
    return model_for_sglang("llama", tmp_path_factory.mktemp("other-llama"), shards=2, seed=21)


def test_tokens_parameters_and_updates_are_as_with_sglangs_own_loader(
    expected: Served, llama: Path, other_llama: Path, tmp_path: Path
) -> None:
    """One server for all of it: each takes half a minute to start."""
    options = '{"threads": 3}'
    with running(VERSION, llama, tmp_path, *FORMAT, "--model-loader-extra-config", options, env={}) as server:
        assert expected.text.strip()
        assert server.complete(PROMPT, max_tokens=24) == expected.text
        assert digests(tmp_path) == expected.parameters
        assert len(expected.parameters["rank-0"]) > 10

        assert server.update_weights(other_llama) == (True, "Succeeded to update model weights.")
        changed = server.complete(PROMPT, max_tokens=24)
        assert changed != expected.text

        success, message = server.update_weights(other_llama.parent / "nothing-there")
        assert not success
        assert server.complete(PROMPT, max_tokens=24) == changed, message

        success, message = server.update_weights(llama, load_format="b10_3fs")
        assert (success, message) == (True, "Succeeded to update model weights.")
        assert server.complete(PROMPT, max_tokens=24) == expected.text

        assert server.update_weights(other_llama, load_format="auto")[0]
        assert server.complete(PROMPT, max_tokens=24) == changed, "SGLang's own loader gives other weights"
    lines = loaded_lines(server.log)
    assert len(lines) == 3
    assert all("3 threads" in line for line in lines), "an update forgot the options of the first load"
    assert "21 tensors, 3 files" in lines[0]
    assert "materialised" not in lines[0]


def test_a_damaged_update_is_refused_and_what_lies_beside_a_model_is_read_as_by_sglangs_own_loader(
    llama: Path, tmp_path: Path
) -> None:
    """One server for both: draft layers, adapters and files of multi-token prediction are read in its scheduler."""
    damaged = model_for_sglang("llama", tmp_path / "damaged", shards=2)
    shard = damaged / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    probe, beside = tmp_path / "probe", tmp_path / "beside"
    of_checkpoint = with_layers_that_predict(beside)
    with running(VERSION, llama, probe, *FORMAT, env={"SGLANG_PROBE_BESIDE": str(beside)}) as server:
        before = server.complete(PROMPT, max_tokens=12)
        success, message = server.update_weights(damaged)
        assert not success
        assert f"{shard}: the data is cut short" in message
        assert server.complete(PROMPT, max_tokens=12) == before
    found = json.loads((probe / "beside.json").read_text())
    for kind in ("model", "draft", "adapter"):
        assert found[f"{kind} b10_3fs"] == found[f"{kind} auto"]
    assert set(found["model auto"]) - {"model.layers.2.norm.weight"} == of_checkpoint
    assert "model.layers.2.norm.weight" in found["model auto"]
    assert found["draft auto"] == {
        "model.mtp.layers.0.norm.weight": 32.0,
        "model.mtp.layers.0.head.weight": 48.0,
        "model.embed_tokens.weight": 64.0,
    }
    assert len(found["adapter auto"]) == 4


def with_layers_that_predict(checkpoint: Path) -> set[str]:
    """Write a checkpoint with two layers of multi-token prediction, and a third in a file that its index leaves out.

    Returns:
        The names in the index.
    """
    names = ("model.mtp.layers.0.norm", "model.mtp.layers.1.norm", "model.mtp.layers.1.head", "model.embed_tokens")
    tensors = {f"{name}.weight": torch.full((4, 4), float(number)) for number, name in enumerate(names, 1)}
    checkpoint.mkdir()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.layers.2.norm.weight": torch.ones(3)}, checkpoint / "mtp.safetensors", metadata={"format": "pt"})
    return set(tensors)


def test_tensor_parallel_2_holds_the_same_parameters_on_each_rank(llama: Path, tmp_path: Path) -> None:
    arguments = ("--tp-size", "2")
    expected = served(VERSION, llama, tmp_path / "auto", "--load-format", "auto", *arguments, **TWO_RANKS)
    found = served(VERSION, llama, tmp_path / "b10", *FORMAT, *arguments, **TWO_RANKS)
    assert list(expected.parameters) == ["rank-0", "rank-1"]
    assert found.parameters == expected.parameters
    assert found.text == expected.text
    assert len(loaded_lines(found.log)) == 1


def test_streamed_weights_are_the_same(tmp_path: Path) -> None:
    model = model_for_sglang("qwen3-moe", tmp_path / "model", shards=2)
    expected = served(VERSION, model, tmp_path / "auto", "--load-format", "auto")
    options = '{"mode": "stream", "block_bytes": "64KiB"}'
    found = served(VERSION, model, tmp_path / "b10", *FORMAT, "--model-loader-extra-config", options)
    assert found.parameters == expected.parameters
    assert found.text == expected.text


def test_a_trainings_checkpoint_is_served_and_taken_as_an_update(
    llama: Path, expected: Served, other_llama: Path, tmp_path: Path
) -> None:
    model = trained(llama, tmp_path / "model", "mesh")
    update = trained(other_llama, tmp_path / "update", "safetensors")
    options = ("--model-loader-extra-config", json.dumps({"key_mapping": {"^model[.]": ""}}))
    with running(VERSION, model, tmp_path / "b10", *FORMAT, *options, env={}) as server:
        assert server.complete(PROMPT, max_tokens=24) == expected.text
        assert digests(tmp_path / "b10") == expected.parameters
        assert server.update_weights(update) == (True, "Succeeded to update model weights.")
        changed = server.complete(PROMPT, max_tokens=24)
        assert server.update_weights(other_llama, load_format="auto")[0]
        assert server.complete(PROMPT, max_tokens=24) == changed != expected.text
    assert "21 tensors, 4 files" in loaded_lines(server.log)[0]


def test_names_that_are_not_the_models_stop_the_start_with_a_mapping(llama: Path, tmp_path: Path) -> None:
    model = trained(llama, tmp_path / "model", "fsdp", prefix="module.")
    with pytest.raises(RuntimeError, match="ended") as ended, running(VERSION, model, tmp_path, *FORMAT, env={}):
        pass
    assert """set --model-loader-extra-config '{"key_mapping": {"^module[.]": ""}}'""" in str(ended.value)


def test_a_model_on_3fs_is_read_by_usrbio(expected: Served, tmp_path: Path) -> None:
    model = model_for_sglang("llama", emulator().mount / "sglang-llama", shards=3)
    environment = emulator().environment("jitter_us=500,short_every=5,error_every=11")
    found = served(VERSION, model, tmp_path / "b10", *FORMAT, **environment)
    assert found.parameters == expected.parameters
    (line,) = loaded_lines(found.log)
    assert "from usrbio (cpp engine" in line
    assert not list((emulator().mount / "3fs-virt" / "iovs").iterdir())


def test_weights_can_lie_elsewhere_than_the_model(llama: Path, other_llama: Path, tmp_path: Path) -> None:
    expected = served(VERSION, other_llama, tmp_path / "auto", "--load-format", "auto")
    options = json.dumps({"weights_uri": str(other_llama)})
    found = served(VERSION, llama, tmp_path / "b10", *FORMAT, "--model-loader-extra-config", options)
    assert found.parameters == expected.parameters
