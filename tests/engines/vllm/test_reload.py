"""vLLM's reload_weights: the new weights are those that it was told of, wherever the first ones came from."""

import json
import shutil
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_loader import CheckpointError
from engine_loader.engines.vllm.rank import Rank, RankModel
from engine_loader.engines.vllm.sharded import reshard
from tests.support.tiny_models import make_model
from tests.support.training_checkpoints import copy_bare, trained
from tests.support.vllm_inprocess import State, differences, load_state_as, rank_as, state_of
from tests.support.vllm_server import VllmServer

from .conftest import PROMPT

pytestmark = pytest.mark.engine

ARGUMENTS = {"dtype": "bfloat16", "max_model_len": 256}
MODES = ["direct", "stream"]


@pytest.fixture(scope="module")
def old(llama: Path) -> Path:
    return llama


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other values."""
    return make_model("llama", tmp_path_factory.mktemp("new"), shards=2, seed=77)


@pytest.fixture(scope="module")
def states(old: Path, new: Path) -> dict[str, State]:
    """What vLLM's own loader makes of either."""
    return {"old": load_state_as(old, "auto", Rank())[0], "new": load_state_as(new, "auto", Rank())[0]}


@pytest.fixture
def bare(old: Path, tmp_path: Path) -> Path:
    return copy_bare(old, tmp_path / "bare")


def reload(built: RankModel, path: Path | None = None) -> State:
    """What the model holds after vLLM's reload_weights, all of it having been zero before."""
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.zero_()
        reload_weights(built.config, built.module, None, None if path is None else str(path), True)
    return state_of(built.module)


@contextmanager
def serving(directory: Path, load_format: str = "b10_3fs", **options: Any) -> Iterator[RankModel]:
    with rank_as(directory, load_format, Rank(), options, **ARGUMENTS) as built, unpacked():
        built.load()
        yield built


@contextmanager
def unpacked() -> Iterator[None]:
    """Layers are left as they are loaded: on the CPU, vLLM packs them for its kernels, and then cannot reload them."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    with pytest.MonkeyPatch.context() as patch:
        for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            patch.setattr(method, "process_weights_after_loading", lambda *_: None)
        yield


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["safetensors", "training"])
def test_a_path_goes_before_weights_uri(
    mode: str, kind: str, bare: Path, old: Path, new: Path, states: dict[str, State], tmp_path: Path
) -> None:
    path = new if kind == "safetensors" else trained(new, tmp_path / "trained", "fsdp", prefix="")
    with serving(bare, mode=mode, weights_uri=str(old)) as built:
        assert differences(states["old"], state_of(built.module)) == []
        assert differences(states["new"], reload(built, path)) == []
        # As with vLLM's own loader, a reload without a path takes those of the last path from now on.
        assert differences(states["new"], reload(built)) == []
        assert differences(states["old"], reload(built, bare)) == []


@pytest.mark.parametrize("mode", MODES)
def test_without_a_path_the_weights_are_read_again_from_where_they_were(
    mode: str, bare: Path, new: Path, states: dict[str, State], tmp_path: Path
) -> None:
    shutil.copytree(new, tmp_path / "weights")
    with serving(bare, mode=mode, weights_uri=str(tmp_path / "weights")) as built:
        assert differences(states["new"], reload(built)) == []
    with serving(trained(new, tmp_path / "trained", "mesh", prefix=""), mode=mode) as built:
        assert differences(states["new"], reload(built)) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_path_without_weights_uri(mode: str, old: Path, new: Path, states: dict[str, State]) -> None:
    with serving(old, mode=mode) as built:
        assert differences(states["new"], reload(built, new)) == []
        assert differences(states["old"], reload(built, old)) == []


def test_weights_uri_after_a_start_without_weights(bare: Path, old: Path, new: Path, states: dict[str, State]) -> None:
    for path, name in ((None, "old"), (new, "new")):
        with serving(bare, "dummy") as built:
            built.config.load_config.load_format = "b10_3fs"
            built.config.load_config.model_loader_extra_config = {"weights_uri": str(old)}
            assert differences(states[name], reload(built, path)) == []


@pytest.mark.parametrize("uri", [True, False])
def test_a_path_where_nothing_lies_is_an_error_and_the_old_weights_stay(
    uri: bool, bare: Path, old: Path, states: dict[str, State], tmp_path: Path
) -> None:
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    options = {"weights_uri": str(old)} if uri else {}
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes(b"damaged")
    with serving(bare if uri else old, **options) as built:
        for path in (str(tmp_path / "nothing"), str(damaged)):
            with pytest.raises(CheckpointError, match=path):
                reload_weights(built.config, built.module, None, path, True)
            assert differences(states["old"], state_of(built.module)) == []


def test_a_sharded_state_checkpoint_is_refused_in_place(
    old: Path, new: Path, states: dict[str, State], tmp_path: Path
) -> None:
    reshard(str(new), str(tmp_path / "sharded"), Rank(), **ARGUMENTS)
    with serving(old) as built:
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        with pytest.raises(CheckpointError, match=r"sharded_state one.*start a server with it"):
            reload_weights(built.config, built.module, None, str(tmp_path / "sharded"), True)
        assert differences(states["old"], state_of(built.module)) == []


def test_a_server_answers_by_the_weights_that_it_was_last_told_of(
    bare: Path, old: Path, new: Path, llama_answer: str, tmp_path: Path
) -> None:
    with VllmServer(new, "--load-format", "auto") as server:
        new_answer = server.complete(PROMPT, max_tokens=24)
    assert new_answer != llama_answer
    options = ("--load-format", "b10_3fs", "--model-loader-extra-config", json.dumps({"weights_uri": str(old)}))
    with VllmServer(bare, *options, env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        assert server.complete(PROMPT, max_tokens=24) == llama_answer
        for path, answer in ((str(new), new_answer), (None, new_answer), (str(bare), llama_answer)):
            server.post("/collective_rpc", method="reload_weights", kwargs={"weights_path": path})
            assert server.complete(PROMPT, max_tokens=24) == answer
        with pytest.raises(urllib.error.HTTPError):
            server.post("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(tmp_path / "nothing")})
        assert server.complete(PROMPT, max_tokens=24) == llama_answer
