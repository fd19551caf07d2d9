"""The other ways in which vLLM loads weights a second time: behind adapters, after sleep, by a changed configuration.
Each is compared with what vLLM's own loader does there.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine_loader.engines.vllm.rank import Rank, RankModel
from tests.support.tiny_models import make_model
from tests.support.training_checkpoints import copy_bare, trained
from tests.support.vllm_inprocess import State, differences, rank_as, state_of

from .test_reload import ARGUMENTS, MODES, unpacked

pytestmark = pytest.mark.engine

KINDS = ["directory", "weights_uri", "training"]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("new"), shards=2, seed=77)


class Places:
    """A start from the weights ``old`` and a reload from ``new``, each with what the loader is told."""

    def __init__(self, kind: str, old: Path, new: Path, scratch: Path) -> None:
        self.options: dict[str, Any] = {}
        self.start = old
        self.path = new
        if kind == "weights_uri":
            self.start, self.options = copy_bare(old, scratch / "bare"), {"weights_uri": str(old)}
        elif kind == "training":
            self.start = trained(old, scratch / "old", "fsdp", prefix="")
            self.path = trained(new, scratch / "new", "mesh", prefix="")


@contextmanager
def built(
    directory: Path, load_format: str, options: Mapping[str, Any] | None = None, **arguments: Any
) -> Iterator[RankModel]:
    with rank_as(directory, load_format, Rank(), options, **{**ARGUMENTS, **arguments}) as model, unpacked():
        yield model


def reload(model: RankModel, path: Path | None = None) -> None:
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    with torch.inference_mode():
        reload_weights(model.config, model.module, None, None if path is None else str(path), True)


def behind_adapters(model: RankModel, path: Path) -> None:
    """Layers are wrapped for LoRA before the reload."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    runner = LoRAModelRunnerMixin()
    runner.load_lora_model(model.module, model.config, torch.device("cpu"))
    reload(model, path)


def after_sleep(model: RankModel, path: Path) -> None:
    """Sleep of level 2 gives the memory of weights up: on waking it holds anything, but in buffers, which are saved."""
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(float("nan"))
    reload(model, path)


WAYS: dict[str, tuple[Callable[[RankModel, Path], None], dict[str, Any]]] = {
    "adapters": (behind_adapters, {"enable_lora": True, "max_lora_rank": 8}),
    "sleep": (after_sleep, {}),
}


def by_vllms_own(way: str, old: Path, new: Path) -> State:
    again, arguments = WAYS[way]
    with built(old, "auto", **arguments) as model:
        model.load()
        again(model, new)
        return state_of(model.module)


@pytest.fixture(scope="module", params=sorted(WAYS))
def way(request: pytest.FixtureRequest, llama: Path, new: Path) -> tuple[str, State]:
    return request.param, by_vllms_own(request.param, llama, new)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_reload(way: tuple[str, State], kind: str, mode: str, llama: Path, new: Path, tmp_path: Path) -> None:
    again, arguments = WAYS[way[0]]
    places = Places(kind, llama, new, tmp_path)
    with built(places.start, "b10_3fs", {"mode": mode, **places.options}, **arguments) as model:
        model.load()
        again(model, places.path)
        assert differences(way[1], state_of(model.module)) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_back_to_the_weights_on_disk_after_others_from_memory(
    kind: str, mode: str, llama: Path, new: Path, tmp_path: Path
) -> None:
    """As a trainer hands weights over (vLLM's weight transfer): these ask no loader, the reload behind them does."""
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    expected = by_vllms_own("sleep", llama, new)
    places = Places(kind, llama, new, tmp_path)
    with built(places.start, "b10_3fs", {"mode": mode, **places.options}) as model:
        model.load()
        before = state_of(model.module)
        handed_over = [item for path in sorted(new.glob("*.safetensors")) for item in load_file(path).items()]
        with torch.inference_mode():
            reload_weights(model.config, model.module, handed_over, None, True)
        assert differences(expected, state_of(model.module)) == []
        reload(model)
        assert differences(before, state_of(model.module)) == []


def test_weights_uri_set_anew_before_a_reload(llama: Path, new: Path, tmp_path: Path) -> None:
    from vllm.config.utils import update_config

    bare = copy_bare(llama, tmp_path / "bare")
    expected = by_vllms_own("sleep", llama, new)
    with built(bare, "b10_3fs", {"weights_uri": str(llama)}) as model:
        model.load()
        options = {"model_loader_extra_config": {"weights_uri": str(new)}}
        model.config.load_config = update_config(model.config.load_config, options)
        reload(model)
        assert differences(expected, state_of(model.module)) == []


def test_a_reload_streams_in_bounded_memory(tmp_path: Path, vllm_log: pytest.LogCaptureFixture) -> None:
    """vLLM keeps a layer's tensors until it has all of them: with a buffer that is smaller than a layer, too."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 32}
    old = make_model("llama", tmp_path / "old", **sizes)
    new = make_model("llama", tmp_path / "new", shards=2, seed=77, **sizes)
    size = sum(path.stat().st_size for path in new.glob("*.safetensors"))
    expected = by_vllms_own("sleep", old, new)
    options = {"buffer_bytes": "1MiB", "block_bytes": "64KiB", "read_mode": "buffered"}
    with built(old, "b10_3fs", options) as model:
        model.load()
        vllm_log.clear()
        reload(model, new)
        assert differences(expected, state_of(model.module)) == []
    (line,) = [r.getMessage() for r in vllm_log.records if "b10_3fs: loaded" in r.getMessage()]
    assert _peak_buffers(line) < size / 3  # the buffer, and what vLLM holds


def _peak_buffers(line: str) -> float:
    found = re.search(r"peak buffers ([\d.]+) (\w+)", line)
    assert found, line
    return float(found[1]) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[found[2]]
