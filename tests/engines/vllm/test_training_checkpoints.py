"""vLLM with a training's checkpoint (torch.distributed.checkpoint) for weights: on a disk, and in an object store."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engine_loader import CheckpointError
from engine_loader.engines.vllm.rank import Rank
from engine_loader.engines.vllm.sharded import reshard
from tests.support.moto_server import MotoServer
from tests.support.tiny_models import make_model
from tests.support.training_checkpoints import KINDS, copy_bare, save_training, trained
from tests.support.vllm_inprocess import State, differences, load_state, load_state_as, rank_as
from tests.support.vllm_server import VllmServer

from .conftest import PROMPT

pytestmark = pytest.mark.engine

MAPPING = {"^model[.]": ""}


@pytest.fixture(scope="module")
def expected(llama: Path) -> State:
    return load_state(llama, "auto")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_safetensors_checkpoint(
    kind: str, llama: Path, expected: State, tmp_path: Path, vllm_log: pytest.LogCaptureFixture
) -> None:
    model = trained(llama, tmp_path, kind)
    for mode in ("direct", "stream"):
        state = load_state(model, "b10_3fs", {"key_mapping": MAPPING, "mode": mode})[0]
        assert differences(expected, state) == []
    lines = [record.getMessage() for record in vllm_log.records if "b10_3fs: loaded" in record.getMessage()]
    files = {"torchs_own": 1, "mesh": 4}.get(kind, 2)
    assert len(lines) == 2
    for line in lines:
        assert "(21 tensors, " in line
        assert f" {files} file" in line
        assert "GB/s, from posix" in line


@pytest.mark.parametrize("kind", ["torchs_own", "fsdp", "columns"])
def test_a_rank_of_two_reads_its_part(kind: str, llama: Path, tmp_path: Path) -> None:
    rank = Rank(tensor_parallel_size=2, rank=1)
    wanted, reader = load_state_as(llama, "b10_3fs", rank)
    state, loader = load_state_as(trained(llama, tmp_path, kind), "b10_3fs", rank, {"key_mapping": MAPPING})
    assert differences(wanted, state) == []
    assert loader.last_load.reports[0].bytes_loaded == reader.last_load.reports[0].bytes_loaded
    assert loader.last_load.materialised == {}


def test_experts_and_what_a_rank_would_read(tmp_path: Path) -> None:
    mixtral = make_model("mixtral", tmp_path / "mixtral", shards=2)
    model = trained(mixtral, tmp_path / "trained", "mesh")
    rank = Rank(tensor_parallel_size=2)
    wanted, _ = load_state_as(mixtral, "auto", rank)
    state, _ = load_state_as(model, "b10_3fs", rank, {"key_mapping": MAPPING})
    assert differences(wanted, state) == []
    kept = []
    for directory, extra in ((mixtral, {}), (model, {"key_mapping": MAPPING})):
        with rank_as(directory, "b10_3fs", rank, extra, dtype="bfloat16", max_model_len=256) as built:
            explanation = built.loader.explain(built.module, built.config.model_config)
        kept.append({kind: row["kept_bytes"] for kind, row in explanation.totals().items()})
    assert kept[0] == kept[1]


def test_it_is_resharded_as_any_other(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(llama, tmp_path / "trained", "fsdp")
    monkeypatch.setenv("ENGINE_LOADER_LOADER__KEY_MAPPING", '{"^model[.]": ""}')
    reshard(str(model), str(tmp_path / "tp2"), Rank(2), dtype="bfloat16", max_model_len=256)
    rank = Rank(2, rank=1)
    wanted, _ = load_state_as(llama, "auto", rank)
    state, _ = load_state_as(tmp_path / "tp2", "b10_3fs", rank)
    assert differences(wanted, state) == []


@pytest.mark.parametrize(
    ("prefix", "suggested"),
    [
        ("model.", r'{"^model[.]": ""}'),
        ("module._orig_mod.", r'{"^module[.]|_orig_mod[.]": ""}'),
        ("state.network.", r'{"^state[.]network[.]": ""}'),
    ],
)
def test_names_that_do_not_fit_are_told_with_what_mends_it(
    prefix: str, suggested: str, llama: Path, expected: State, tmp_path: Path
) -> None:
    model = trained(llama, tmp_path, "torch_save", prefix=prefix)
    with pytest.raises(CheckpointError) as caught:
        load_state(model, "b10_3fs")
    text = str(caught.value)
    assert text.startswith(
        f"{tmp_path}: the names in this training checkpoint are not those of LlamaForCausalLM: it has"
    )
    assert f"'{prefix}" in text
    assert "the model has 'model.embed_tokens.weight', " in text
    (mapping,) = [part for part in text.split("'") if part.startswith('{"key_mapping"')]
    assert suggested in mapping
    assert differences(expected, load_state(model, "b10_3fs", json.loads(mapping))[0]) == []
    # What is suggested is to be set in place of what is set.
    with pytest.raises(CheckpointError, match=r", of which key_mapping makes 'wrong[.]") as again:
        load_state(model, "b10_3fs", {"key_mapping": {"^": "wrong."}})
    assert mapping in str(again.value)


def test_a_failure_of_another_kind_stays_what_it_is(llama: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for path in llama.glob("*.safetensors") for name, tensor in load_file(path).items()}
    del tensors["model.norm.weight"]
    save_training(tensors, copy_bare(llama, tmp_path), "torch_save", prefix="")
    with pytest.raises(ValueError, match=r"(?s)not initialized from checkpoint.*model.norm.weight"):
        load_state(tmp_path, "b10_3fs")


@pytest.fixture
def bucket(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object store with the training under s3://trainings/step-7."""
    training = trained(llama, tmp_path / "trained", "fsdp")
    with MotoServer() as moto:
        content = {f"step-7/{path.name}": path.read_bytes() for path in training.iterdir() if path.name[0] in "._"}
        moto.put("trainings", content)
        values = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": moto.url}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        yield moto


def test_a_training_in_an_object_store(
    bucket: MotoServer, llama: Path, expected: State, llama_answer: str, tmp_path: Path
) -> None:
    bare = copy_bare(llama, tmp_path / "bare")
    extra = {"weights_uri": "s3://trainings/step-7", "key_mapping": MAPPING}
    for mode in ("direct", "stream"):
        assert differences(expected, load_state(bare, "b10_3fs", {**extra, "mode": mode})[0]) == []
    rank = Rank(tensor_parallel_size=2, rank=1)
    wanted, _ = load_state_as(llama, "auto", rank)
    state, _ = load_state_as(bare, "b10_3fs", rank, {**extra, "weights_uri": "s3://trainings/step-7//"})
    assert differences(wanted, state) == []
    with pytest.raises(CheckpointError, match=r"s3://trainings/step-7: the names in this training checkpoint"):
        load_state(bare, "b10_3fs", {"weights_uri": "s3://trainings/step-7"})

    config = '{"weights_uri": "s3://trainings/step-7", "key_mapping": {"^model[.]": ""}}'
    with VllmServer(bare, "--load-format", "b10_3fs", "--model-loader-extra-config", config) as server:
        assert server.complete(PROMPT, max_tokens=24) == llama_answer
    (line,) = [line for line in server.log.splitlines() if "b10_3fs: loaded" in line]
    assert "from object_store" in line


def test_a_server_answers_from_a_training_on_disk_as_from_safetensors(
    llama: Path, llama_answer: str, tmp_path: Path
) -> None:
    """With the names mapped by a function of one's own, which the engine's processes import."""
    model = trained(llama, tmp_path / "trained", "mesh")
    (tmp_path / "our_names.py").write_text("def to_hf(name):\n    return name.removeprefix('model.')\n")
    env = {"PYTHONPATH": str(tmp_path), "ENGINE_LOADER_LOADER__KEY_MAPPING": "our_names:to_hf"}
    with VllmServer(model, "--load-format", "b10_3fs", env=env) as server:
        assert server.complete(PROMPT, max_tokens=24) == llama_answer
    (line,) = [line for line in server.log.splitlines() if "b10_3fs: loaded" in line]
    assert "(21 tensors, 4 files)" in line
    assert "100% Completed" in server.log
