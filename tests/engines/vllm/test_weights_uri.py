"""vLLM with a model whose weights lie elsewhere: in an object store, or in another directory."""

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine_loader import CheckpointError, SettingsError
from engine_loader.engines.vllm.rank import Rank
from tests.support.moto_server import MotoServer
from tests.support.vllm_inprocess import State, differences, load_state, load_state_as, rank_as
from tests.support.vllm_server import VllmServer

from .conftest import PROMPT

pytestmark = pytest.mark.engine

URI = "s3://models/llama"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@pytest.fixture(scope="module")
def model(llama: Path) -> Path:
    return llama


@pytest.fixture(scope="module")
def expected(model: Path) -> State:
    return load_state(model, "auto")[0]


@pytest.fixture(scope="module")
def moto(model: Path) -> Iterator[MotoServer]:
    with MotoServer() as server:
        weights = {f"llama/{path.name}": path.read_bytes() for path in model.glob("*.safetensors*")}
        server.put("models", weights)
        server.put("other", {"readme": b""})
        yield server


@pytest.fixture
def bare(model: Path, tmp_path: Path) -> Path:
    """The model's directory without its weights."""
    for path in model.iterdir():
        if "safetensors" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(autouse=True)
def _environment(moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": moto.url}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("mode", ["direct", "stream"])
@pytest.mark.parametrize("uri", [URI, f"{URI}//"])
def test_weights_of_an_object_store_are_loaded_bit_for_bit(mode: str, uri: str, bare: Path, expected: State) -> None:
    state = load_state(bare, "b10_3fs", {"weights_uri": uri, "mode": mode})[0]
    assert not differences(expected, state)


def test_a_rank_of_two_loads_its_part(bare: Path, model: Path) -> None:
    rank = Rank(tensor_parallel_size=2, rank=1)
    wanted, _ = load_state_as(model, "b10_3fs", rank)
    state, _ = load_state_as(bare, "b10_3fs", rank, {"weights_uri": URI})
    assert not differences(wanted, state)


def test_what_a_rank_would_read_can_be_explained(bare: Path, model: Path) -> None:
    rank = Rank(tensor_parallel_size=2)
    kept = []
    for directory, extra in ((model, {}), (bare, {"weights_uri": URI})):
        with rank_as(directory, "b10_3fs", rank, extra, dtype="bfloat16", max_model_len=256) as built:
            explanation = built.loader.explain(built.module, built.config.model_config)
        kept.append({kind: row["kept_bytes"] for kind, row in explanation.totals().items()})
    assert kept[0] == kept[1]
    assert set(explanation.files.values()) == {"object_store: by ranges"}


def test_what_vllm_remembers_of_a_model_that_is_gone_is_not_taken_for_this_one(model: Path) -> None:
    from vllm.model_executor.models import utils

    with rank_as(model, "b10_3fs", Rank(tensor_parallel_size=2), {}, dtype="bfloat16", max_model_len=256) as built:
        load = functools.partial(built.loader.explain, built.module, built.config.model_config)
        right = load().totals()
        utils._model_to_pp_missing_layer_names[id(built.module)] = ["model.layers.1."]
        try:
            assert load().totals() == right
        finally:
            del utils._model_to_pp_missing_layer_names[id(built.module)]


def test_a_reload_may_name_a_url(model: Path) -> None:
    config = SimpleNamespace(model=URI, revision=None)
    weights = dict(make_loader().get_all_weights(config, torch.nn.Module()))
    expected = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_weights_of_another_directory(bare: Path, model: Path, expected: State) -> None:
    assert not differences(expected, load_state(bare, "b10_3fs", {"weights_uri": str(model)})[0])


def test_it_goes_before_weights_in_the_models_directory(model: Path, bare: Path, expected: State) -> None:
    (bare / "model.safetensors").write_bytes(b"damaged")
    assert not differences(expected, load_state(bare, "b10_3fs", {"weights_uri": URI})[0])


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        (
            "s3://models/nothing",
            CheckpointError,
            "s3://models/nothing: could not open the object: there is no such object",
        ),
        (
            "s3://other",
            CheckpointError,
            r"s3://other: weights_uri: no .safetensors file in this directory \(it has readme",
        ),
        ("s3://nowhere/x", CheckpointError, "s3://nowhere/x: .*there is no such bucket"),
        ("/nothing/here", CheckpointError, "/nothing/here: could not open the file: No such file"),
    ],
)
def test_where_there_are_no_weights_the_uri_is_named(
    uri: str, error: type[Exception], message: str, bare: Path
) -> None:
    with pytest.raises(error, match=message):
        load_state(bare, "b10_3fs", {"weights_uri": uri})


def test_a_backend_that_reads_no_urls_is_refused(bare: Path) -> None:
    with pytest.raises(SettingsError, match="backend: posix does not read weights_uri: s3://models/llama"):
        load_state(bare, "b10_3fs", {"weights_uri": URI, "backend": "posix"})


def make_loader(**options: Any) -> Any:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return get_model_loader(LoadConfig(load_format="b10_3fs", model_loader_extra_config=options))


def test_a_draft_model_keeps_weights_of_its_own(model: Path, bare: Path) -> None:
    loader = make_loader(weights_uri=URI)
    assert loader._replacement(SimpleNamespace(model=str(model), runner_type="draft")) is None
    # Where it has none, its layers are part of the checkpoint that the main model is loaded from.
    assert loader._replacement(SimpleNamespace(model=str(bare), runner_type="draft")) == (str(bare), URI)
    assert loader._replacement(SimpleNamespace(model=str(model), runner_type="generate")) == (str(model), URI)


def test_files_by_pattern_and_in_a_subfolder(moto: MotoServer, model: Path) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    shard = "model-00002-of-00003.safetensors"
    content = (model / shard).read_bytes()
    moto.put("models", {"parts/audio/consolidated.safetensors": content, "parts/audio/model.safetensors": b"damaged"})
    loader = make_loader(weights_uri="s3://models/parts")
    loader._replaced = ("name", "s3://models/parts")
    source = DefaultModelLoader.Source(
        "name", None, subfolder="audio", prefix="audio.", allow_patterns_overrides=["consolidated*.safetensors"]
    )
    names = {name for name, _ in loader._get_weights_iterator(source)}
    assert names
    assert all(name.startswith("audio.model.layers.") or "embed" in name or "norm" in name for name in names)


def test_a_server_answers_as_with_weights_on_disk(bare: Path, llama_answer: str) -> None:
    extra = ("--load-format", "b10_3fs", "--model-loader-extra-config", f'{{"weights_uri": "{URI}"}}')
    with VllmServer(bare, *extra) as server:
        assert server.complete(PROMPT, max_tokens=24) == llama_answer
